//! What the kernel has written down of each thread of a process and tells only to the thread
//! itself, read by a BPF program of ours that the kernel runs for each (a task iterator).
//!
//! It takes under a microsecond for a thread, where entering one takes fifty. Nothing of it
//! stays: the program goes with its descriptor.
//!
//! # References
//! bpf(2); the kernel's Documentation/bpf/bpf_iterators.rst
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use freezeframe_error::{Error, Result, SysExt};

use crate::bpf::{
    ADD, Attributes, CALL, EXIT, FRAME, JUMP_IF, LOAD_4, LOAD_8, MOVE, Make, R0, R1, R2, R3, R6,
    R7, SET, STORE_8, TRACE_ITER, load_iterator, op,
};
use crate::btf::{Btf, Field, Is};
use crate::ids::{Pid, Tid};

/// What the kernel has written down of a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskFields {
    /// Its alternate signal stack, as sigaltstack(2) has it: address.
    pub altstack: u64,
    /// Size in bytes; 0: it has none.
    pub altstack_size: u64,
    /// SS_AUTODISARM or none.
    pub altstack_flags: u32,
    /// PR_GET_TID_ADDRESS.
    pub tid_address: u64,
    /// PR_GET_PDEATHSIG.
    pub parent_death: i32,
    /// personality(2).
    pub personality: u32,
    /// PR_GET_TIMERSLACK, in ns.
    pub timer_slack: u64,
    /// PR_GET_SECUREBITS.
    pub securebits: u32,
    /// In no order that is the same everywhere: what it may do and has been told. Two threads of
    /// a process in which these are equal give equal answers of TSC, CPUID, speculation control
    /// and machine checks.
    pub flags: [u64; 3],
}

/// How deep the PID namespace may be that we are in.
const LEVELS: usize = 4;
/// One number in the program's answer for each of these.
const ROW: usize = LEVELS + 13;
const BYTES: usize = 8 * ROW;

/// The program, ready to run.
#[derive(Debug)]
pub struct TaskIter {
    program: OwnedFd,
    /// How many PID namespaces are above ours.
    level: usize,
}

impl TaskIter {
    /// Loads the program. CAP_BPF and CAP_PERFMON are needed (EPERM), and a kernel that tells
    /// its types and has task iterators ([`Kind::Unsupported`](freezeframe_error::Kind::Unsupported), EINVAL).
    pub fn new() -> Result<TaskIter> {
        TaskIter::of(&Btf::of_kernel()?)
    }

    /// The same, for a kernel of which the types have been read.
    pub fn of(btf: &Btf) -> Result<TaskIter> {
        let mut iter = TaskIter {
            program: load_iterator(&program(btf)?, btf.find(Is::Function, "bpf_iter_task")?)?,
            level: 0,
        };
        let own = Pid::this();
        let rows = iter.rows(own)?;
        let level = rows.first().map_or(LEVELS, |row| row[LEVELS] as usize);
        if level >= LEVELS || rows.iter().all(|row| row[level] != own.0 as u64) {
            return Err(Error::unsupported("a PID namespace so deep"));
        }
        iter.level = level;
        Ok(iter)
    }

    /// Of each thread of a process. None of it changes while they are stopped.
    pub fn read(&self, process: Pid) -> Result<HashMap<Tid, TaskFields>> {
        let rows = self.rows(process)?;
        Ok(rows.iter().map(|row| self.fields(row)).collect())
    }

    /// Where the kernel has its account of the memory of a process; None if it has none.
    pub(crate) fn memory(&self, process: Pid) -> Result<Option<u64>> {
        let rows = self.rows(process)?;
        let memory = rows.first().map(|row| row[LEVELS + 12]);
        Ok(memory.filter(|at| *at != 0))
    }

    fn fields(&self, row: &[u64; ROW]) -> (Tid, TaskFields) {
        let at = |i: usize| row[LEVELS + i];
        let fields = TaskFields {
            altstack: at(1),
            altstack_size: at(2),
            altstack_flags: at(3) as u32,
            tid_address: at(4),
            parent_death: at(5) as i32,
            personality: at(6) as u32,
            timer_slack: at(7),
            securebits: at(8) as u32,
            flags: [at(9), at(10), at(11)],
        };
        (Tid(row[self.level] as i32), fields)
    }

    fn rows(&self, process: Pid) -> Result<Vec<[u64; ROW]>> {
        let mut bytes = Vec::new();
        self.start(process)?
            .read_to_end(&mut bytes)
            .sys("read(BPF iterator)")?;
        let words = |row: &[u8]| {
            let mut words = row
                .chunks_exact(8)
                .map(|w| u64::from_le_bytes(w.try_into().expect("eight")));
            std::array::from_fn(|_| words.next().expect("a whole row"))
        };
        Ok(bytes.chunks_exact(BYTES).map(words).collect())
    }

    /// A file that gives a row for each thread.
    fn start(&self, process: Pid) -> Result<File> {
        // union bpf_iter_link_info: a TID, or a PID, or a pidfd.
        let which = [0u32, process.0 as u32, 0, 0];
        let mut link = Attributes::default();
        link.word(0, self.program.as_raw_fd() as u32)
            .word(8, TRACE_ITER);
        link.long(16, which.as_ptr() as u64)
            .word(24, size_of_val(&which) as u32);
        let link = link.make(Make::Link)?;
        let mut iter = Attributes::default();
        iter.word(0, link.as_raw_fd() as u32);
        Ok(File::from(iter.make(Make::Iterator)?))
    }
}

/// Those of its registers that outlive calls.
const META: u8 = R6;
const TASK: u8 = R7;
const SEQ_WRITE: i32 = 127;

/// Loads a field of the structure a register points to.
fn load_field(to: u8, from: u8, field: Field) -> Result<u64> {
    let code = match field.size {
        4 => LOAD_4,
        8 => LOAD_8,
        _ => return Err(Error::unsupported("a field of a size we do not know")),
    };
    let offset = i16::try_from(field.offset);
    let offset = offset.map_err(|_| Error::unsupported("a field too far in"))?;
    Ok(op(code, to, from, offset, 0))
}

/// Puts a row on its stack and gives it to the reader.
fn program(btf: &Btf) -> Result<Vec<u64>> {
    let [task, pid, upid] = ["task_struct", "pid", "upid"].map(|name| btf.find(Is::Struct, name));
    let (task, pid, upid) = (task?, pid?, upid?);
    let [cred, meta] = ["cred", "bpf_iter_meta"].map(|name| btf.find(Is::Struct, name));
    let task = |path: &str| btf.field(task, path);
    let stored = |row: usize| op(STORE_8, FRAME, R0, (8 * row) as i16 - BYTES as i16, 0);
    let mut body = Vec::new();
    // Its number in each PID namespace.
    body.push(load_field(R1, TASK, task("thread_pid")?)?);
    let (numbers, each) = (btf.field(pid, "numbers")?, btf.size_of(upid)?);
    for level in 0..LEVELS {
        let mut number = btf.field(upid, "nr")?;
        number.offset += numbers.offset + level as u32 * each;
        body.extend([load_field(R0, R1, number)?, stored(level)]);
    }
    body.extend([
        load_field(R0, R1, btf.field(pid, "level")?)?,
        stored(LEVELS),
    ]);
    let fields = [
        "sas_ss_sp",
        "sas_ss_size",
        "sas_ss_flags",
        "clear_child_tid",
        "pdeath_signal",
        "personality",
        "timer_slack_ns",
    ];
    for (row, name) in (LEVELS + 1..).zip(fields) {
        body.extend([load_field(R0, TASK, task(name)?)?, stored(row)]);
    }
    for (row, name) in (LEVELS + 9..).zip(["thread_info.flags", "flags", "atomic_flags"]) {
        body.extend([load_field(R0, TASK, task(name)?)?, stored(row)]);
    }
    body.extend([load_field(R0, TASK, task("mm")?)?, stored(LEVELS + 12)]);
    body.push(load_field(R1, TASK, task("cred")?)?);
    body.extend([
        load_field(R0, R1, btf.field(cred?, "securebits")?)?,
        stored(LEVELS + 8),
    ]);
    body.extend([
        load_field(R1, META, btf.field(meta?, "seq")?)?,
        op(MOVE, R2, FRAME, 0, 0),
        op(ADD, R2, 0, 0, -(BYTES as i32)),
        op(SET, R3, 0, 0, BYTES as i32),
        op(CALL, 0, 0, 0, SEQ_WRITE),
    ]);
    // At the end it is called once more, with no task.
    let mut program = vec![
        op(LOAD_8, META, R1, 0, 0),
        op(LOAD_8, TASK, R1, 8, 0),
        op(JUMP_IF, TASK, 0, body.len() as i16, 0),
    ];
    program.extend(body);
    program.extend([op(SET, R0, 0, 0, 0), op(EXIT, 0, 0, 0, 0)]);
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a thread says of itself.
    fn told() -> (Tid, TaskFields) {
        let ask = |option: i32| {
            let mut value = 0u64;
            // SAFETY: these options write 8 bytes at most, for which there is room.
            let done = unsafe { libc::prctl(option, &raw mut value) };
            (done as u64, value)
        };
        // SAFETY: all zeros is a stack_t.
        let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills in `stack`.
        unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
        // SAFETY: asks only.
        let personality = unsafe { libc::personality(0xffff_ffff) } as u32;
        const PR_GET_TID_ADDRESS: i32 = 40;
        let fields = TaskFields {
            altstack: stack.ss_sp as u64,
            altstack_size: stack.ss_size as u64,
            altstack_flags: 0,
            tid_address: ask(PR_GET_TID_ADDRESS).1,
            parent_death: ask(libc::PR_GET_PDEATHSIG).1 as i32,
            personality,
            timer_slack: ask(libc::PR_GET_TIMERSLACK).0,
            securebits: ask(libc::PR_GET_SECUREBITS).0 as u32,
            flags: [0; 3],
        };
        (Tid::this(), fields)
    }

    #[test]
    fn as_threads_say_themselves() {
        let (send, receive) = std::sync::mpsc::channel();
        let gate = std::sync::Arc::new(std::sync::Barrier::new(9));
        let threads: Vec<_> = (0..8)
            .map(|i| {
                let (send, gate) = (send.clone(), gate.clone());
                std::thread::spawn(move || {
                    // SAFETY: attributes of this thread alone, which ends soon.
                    unsafe {
                        libc::prctl(libc::PR_SET_TIMERSLACK, 1000 + i);
                        libc::prctl(
                            libc::PR_SET_PDEATHSIG,
                            if i % 2 == 0 { libc::SIGWINCH } else { 0 },
                        );
                        libc::prctl(libc::PR_SET_KEEPCAPS, i % 2);
                        libc::personality(if i % 4 == 0 {
                            libc::ADDR_NO_RANDOMIZE as u64
                        } else {
                            0
                        });
                    }
                    send.send(told()).unwrap();
                    gate.wait();
                })
            })
            .collect();
        let said: Vec<_> = (0..8).map(|_| receive.recv().unwrap()).collect();
        let read = TaskIter::new().unwrap().read(Pid::this()).unwrap();
        gate.wait();
        threads.into_iter().for_each(|t| t.join().unwrap());
        for (tid, said) in said {
            let read = TaskFields {
                flags: [0; 3],
                ..read[&tid]
            };
            assert_eq!(read, said, "{tid}");
        }
        assert!(read.len() > 8, "{}", read.len());
    }

    #[test]
    fn of_nobody_nothing() {
        let iter = TaskIter::new().unwrap();
        assert!(iter.read(Pid(0x3fff_ffff)).is_ok_and(|all| all.is_empty()));
    }
}
