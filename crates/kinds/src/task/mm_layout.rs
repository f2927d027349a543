//! What the kernel remembers of an address space besides its VMAs: where code,
//! data, heap, stack, arguments and environment lie, the auxiliary vector, and
//! the executable link. They make /proc/PID/{cmdline,environ,auxv,exe,stat} and
//! brk(2) right.
//!
//! Read from /proc/PID/stat and /proc/PID/auxv; the current break by brk(0)
//! inside. Set by prctl(PR_SET_MM, PR_SET_MM_MAP), which unlike the single
//! PR_SET_MM_* works without CAP_SYS_RESOURCE.

use freezeframe_error::{Error, Result, ResultExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct MmLayout;

static ABOUT: About = About {
    tag: Tag::new(*b"MMLA"),
    version: 1,
    name: "mm-layout",
    title: "Code, data, heap, stack, arguments, environment, executable link",
    manual: "PR_SET_MM(2const)",
    since: "",
    carried: "the bounds that /proc/PID/stat shows, the program break, the auxiliary vector, /proc/PID/exe",
    refused: "an executable that was deleted (\"the executable was deleted\")",
    programs: &["heap_brk", "mm_layout"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    start_code: u64,
    end_code: u64,
    start_data: u64,
    end_data: u64,
    start_brk: u64,
    brk: u64,
    start_stack: u64,
    arg_start: u64,
    arg_end: u64,
    env_start: u64,
    env_end: u64,
    auxv: Vec<u8>,
    exe: Vec<u8>,
    exe_size: u64,
    exe_mtime_ns: i64,
}

const PR_SET_MM: i32 = 35;
const PR_SET_MM_MAP: i32 = 14;
/// `sizeof(struct prctl_mm_map)`
const MAP_SIZE: usize = 104;

impl TaskKind for MmLayout {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::Fs
    }
    fn ask(&self, _task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        let brk = batch.call("brk(0)", libc::SYS_brk, [Arg::Imm(0)]);
        Ok(Asked {
            ops: vec![brk],
            data: Vec::new(),
            ..Asked::default()
        })
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        asked: &Asked,
        replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let proc = task.proc;
        let exe = proc.dir.link("exe").on_task(proc.pid.0)?;
        if exe.ends_with(b" (deleted)") {
            return Err(Error::unsupported("the executable was deleted")
                .on(String::from_utf8_lossy(&exe))
                .on_task(proc.pid.0));
        }
        let stat = freezeframe_sys::fd::stat_at(&*proc.dir, c"exe", true).on_task(proc.pid.0)?;
        let s = &proc.stat;
        let record = Record {
            start_code: s.start_code,
            end_code: s.end_code,
            start_data: s.start_data,
            end_data: s.end_data,
            start_brk: s.start_brk,
            brk: replies.raw(asked.ops[0]) as u64,
            start_stack: s.start_stack,
            arg_start: s.arg_start,
            arg_end: s.arg_end,
            env_start: s.env_start,
            env_end: s.env_end,
            auxv: proc.dir.auxv().on_task(proc.pid.0)?,
            exe,
            exe_size: stat.size,
            exe_mtime_ns: stat.mtime_ns,
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let r: Record = ABOUT.decode(record)?;
        if r.auxv.len() > 4096 {
            return Err(Error::corrupt("the auxiliary vector is too long").on_task(task.pid.0));
        }
        crate::mem::file::check_unchanged(&r.exe, r.exe_size, Some(r.exe_mtime_ns))
            .map_err(|e| e.on_task(task.pid.0))?;
        let path = task.batch.cstr(&r.exe);
        let label = format!("open({})", String::from_utf8_lossy(&r.exe));
        let exe = task.batch.call(
            label,
            libc::SYS_openat,
            [
                libc::AT_FDCWD.into(),
                path.into(),
                (libc::O_RDONLY | libc::O_CLOEXEC).into(),
            ],
        );
        let auxv = task.batch.data(&r.auxv);
        let map = task.batch.room(MAP_SIZE);
        let words = [
            r.start_code,
            r.end_code,
            r.start_data,
            r.end_data,
            r.start_brk,
            r.brk,
            r.start_stack,
            r.arg_start,
            r.arg_end,
            r.env_start,
            r.env_end,
        ];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        task.batch.set(map, &bytes);
        task.batch.pointer(map.at(88), auxv);
        task.batch
            .set(map.at(96), &(r.auxv.len() as u32).to_le_bytes());
        // The descriptor's number is known only when the batch runs, and the map
        // must name it: so it goes to a number of our choice.
        let number = task.spare_fd;
        task.batch.call(
            "dup3",
            libc::SYS_dup3,
            [exe.into(), number.into(), libc::O_CLOEXEC.into()],
        );
        task.batch.set(map.at(100), &number.to_le_bytes());
        task.batch.call(
            "prctl(PR_SET_MM_MAP)",
            libc::SYS_prctl,
            [
                PR_SET_MM.into(),
                PR_SET_MM_MAP.into(),
                map.into(),
                MAP_SIZE.into(),
                0.into(),
            ],
        );
        task.batch.call("close", libc::SYS_close, [number.into()]);
        task.batch.call("close", libc::SYS_close, [exe.into()]);
        Ok(())
    }
}
