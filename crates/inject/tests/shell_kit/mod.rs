//! What the tests of restore shells share.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use freezeframe_inject::shell::{Final, Shells, TaskId};
use freezeframe_inject::{Arg, Batch};
use freezeframe_sys::ptrace::Regs;
use nix::sys::wait::{WaitStatus, waitpid};

/// A hole in every process of these tests.
pub(crate) const BASE: u64 = 0x1000_0000_0000;

/// PIDs that nobody has, different from those other tests running now choose, and far from those that the kernel gives
/// away next.
pub(crate) fn free_pids(n: usize) -> Vec<i32> {
    // The last field of /proc/loadavg: the last PID that was given.
    let load = std::fs::read_to_string("/proc/loadavg").unwrap();
    let last = load.split_whitespace().last().unwrap();
    let last: i32 = last.parse().unwrap();
    let apart = (std::process::id() as i32)
        .wrapping_mul(97)
        .rem_euclid(16_000);
    let mut pid = 2000 + (last - 2000 + 8000 + apart).rem_euclid(30_000);
    let mut pids = Vec::new();
    while pids.len() < n {
        pid += 1;
        if pid >= 32_000 {
            pid = 2000;
        }
        if !alive(pid) {
            pids.push(pid);
        }
    }
    pids
}

/// Whether a process or thread has this id (a zombie counts).
pub(crate) fn alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// The state letter of a process.
pub(crate) fn state(pid: i32) -> char {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|s| s.rsplit(')').next()?.trim().chars().next())
        .unwrap_or('-')
}

/// Polls until `f` holds.
pub(crate) fn until(what: &str, mut f: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !f() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Where [`plant`] puts a program's code; its data lies on the next page.
pub(crate) const PROGRAM: u64 = 0x5000_0000;
/// Its data.
pub(crate) const DATA: u64 = PROGRAM + 0x1000;

/// write(r12d, r13, r14d); exit_group(r15d)
pub(crate) const WRITE_AND_EXIT: &[u8] = &[
    0xb8, 1, 0, 0, 0, 0x44, 0x89, 0xe7, 0x4c, 0x89, 0xee, 0x44, 0x89, 0xf2, 0x0f, 0x05, 0xb8, 231,
    0, 0, 0, 0x44, 0x89, 0xff, 0x0f, 0x05,
];
/// write(r12d, r13, r14d); exit(r15d), this thread only
pub(crate) const WRITE_AND_END_THREAD: &[u8] = &[
    0xb8, 1, 0, 0, 0, 0x44, 0x89, 0xe7, 0x4c, 0x89, 0xee, 0x44, 0x89, 0xf2, 0x0f, 0x05, 0xb8, 60,
    0, 0, 0, 0x44, 0x89, 0xff, 0x0f, 0x05,
];
/// syscall; *r13 = rax; write(r12d, r13, 8); exit_group(r15d)
pub(crate) const CALL_AND_WRITE: &[u8] = &[
    0x0f, 0x05, 0x49, 0x89, 0x45, 0x00, 0xb8, 1, 0, 0, 0, 0x44, 0x89, 0xe7, 0x4c, 0x89, 0xee, 0xba,
    8, 0, 0, 0, 0x0f, 0x05, 0xb8, 231, 0, 0, 0, 0x44, 0x89, 0xff, 0x0f, 0x05,
];
/// jmp to itself
pub(crate) const SPIN: &[u8] = &[0xeb, 0xfe];
/// *r13 = xmm0; write(r12d, r13, 16); exit_group(r15d)
pub(crate) const WRITE_XMM0: &[u8] = &[
    0xf3, 0x41, 0x0f, 0x7f, 0x45, 0x00, 0xb8, 1, 0, 0, 0, 0x44, 0x89, 0xe7, 0x4c, 0x89, 0xee, 0xba,
    16, 0, 0, 0, 0x0f, 0x05, 0xb8, 231, 0, 0, 0, 0x44, 0x89, 0xff, 0x0f, 0x05,
];

/// Maps `code` and `data` in a shell, by batches alone.
pub(crate) fn plant(shells: &mut Shells<'_>, task: TaskId, code: &[u8], data: &[u8]) {
    let mut batch = Batch::new();
    let name = batch.cstr(b"program");
    let memfd = batch.call(
        "memfd_create",
        libc::SYS_memfd_create,
        [name.into(), 0.into()],
    );
    let bytes = batch.data(code);
    let put = batch.call(
        "write",
        libc::SYS_write,
        [memfd.into(), bytes.into(), code.len().into()],
    );
    batch.expect(put, code.len() as i64);
    let at = batch.call(
        "mmap(code)",
        libc::SYS_mmap,
        [
            PROGRAM.into(),
            0x1000.into(),
            (libc::PROT_READ | libc::PROT_EXEC).into(),
            (libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE).into(),
            memfd.into(),
            0.into(),
        ],
    );
    batch.expect(at, PROGRAM as i64);
    batch.call("close", libc::SYS_close, [memfd.into()]);
    batch.call(
        "mmap(data)",
        libc::SYS_mmap,
        [
            DATA.into(),
            0x1000.into(),
            (libc::PROT_READ | libc::PROT_WRITE).into(),
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE).into(),
            (-1).into(),
            0.into(),
        ],
    );
    // The kernel copies from the batch's data to the page: into place.
    let ends = batch.room(8);
    batch.call("pipe2", libc::SYS_pipe2, [ends.into(), 0.into()]);
    if !data.is_empty() {
        let bytes = batch.data(data);
        let put = batch.call(
            "write",
            libc::SYS_write,
            [Arg::Load32(ends.at(4)), bytes.into(), data.len().into()],
        );
        batch.call(
            "read",
            libc::SYS_read,
            [Arg::Load32(ends), DATA.into(), put.into()],
        );
    }
    batch.call("close", libc::SYS_close, [Arg::Load32(ends)]);
    batch.call("close", libc::SYS_close, [Arg::Load32(ends.at(4))]);
    shells.run(task, &batch).unwrap();
}

/// Registers of a program at `rip`, outside of any syscall, that writes `len`
/// bytes at [`DATA`] to `fd` and ends with `code`.
pub(crate) fn regs(rip: u64, fd: i32, len: u64, code: u64) -> Regs {
    Regs {
        rip,
        r12: fd as u64,
        r13: DATA,
        r14: len,
        r15: code,
        orig_rax: u64::MAX,
        cs: 0x33,
        ss: 0x2b,
        eflags: 0x202,
        ..Regs::default()
    }
}

/// What a task goes on with.
pub(crate) fn go_on(task: TaskId, regs: Regs) -> Final {
    Final {
        task,
        regs,
        xstate: Vec::new(),
        sigmask: 0,
        stop: None,
        interrupt: None,
    }
}

/// Waits for a child of ours; its wait status.
pub(crate) fn wait(pid: i32) -> WaitStatus {
    waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap()
}
