//! System V shared memory. Each test has an IPC namespace of its own.

use super::os::{self, Region};
use super::{Cx, Program};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "segment",
        "a segment with a key and holes, attached by two processes, detached later",
        segment,
    ),
    Program::new(
        "segment_read_only",
        "one segment attached twice, once to be read only",
        read_only,
    ),
    Program::new(
        "segment_doomed",
        "a segment that goes with its last user",
        doomed,
    )
    .refused("IPC_RMID"),
];

const PAGE: usize = 4096;
const SIZE: usize = 20 * PAGE + 100;
const KEY: usize = 0x6672_7a66;
const IPC_CREAT: usize = 0o1000;
const SHM_RDONLY: usize = 0o10000;
const IPC_RMID: usize = 0;
const IPC_STAT: usize = 2;

/// A segment that is attached.
struct Attached(Region);

impl Attached {
    fn new(id: usize, flags: usize) -> Attached {
        let addr = os::syscall(libc::SYS_shmat, [id, 0, flags, 0, 0, 0]).unwrap() as usize;
        Attached(Region { addr, len: SIZE })
    }
    fn read(&self, at: usize, len: usize) -> Vec<u8> {
        (at..at + len).map(|at| self.0.get(at)).collect()
    }
    fn write(&self, at: usize, bytes: &[u8]) {
        bytes
            .iter()
            .enumerate()
            .for_each(|(i, byte)| self.0.set(at + i, *byte));
    }
    fn detach(self) -> bool {
        os::syscall(libc::SYS_shmdt, [self.0.addr, 0, 0, 0, 0, 0]).is_ok()
    }
}

fn make(key: usize) -> usize {
    os::syscall(libc::SYS_shmget, [key, SIZE, IPC_CREAT | 0o640, 0, 0, 0]).unwrap() as usize
}

/// How often it is attached.
fn attached(id: usize) -> u64 {
    let mut stat = [0u64; 14];
    os::syscall(
        libc::SYS_shmctl,
        [id, IPC_STAT, os::at_mut(&mut stat), 0, 0, 0],
    )
    .unwrap();
    stat[11]
}

fn remove(id: usize) {
    os::syscall(libc::SYS_shmctl, [id, IPC_RMID, 0, 0, 0, 0]).unwrap();
}

fn segment(cx: &Cx) {
    let id = make(KEY);
    let ours = Attached::new(id, 0);
    let bytes = os::bytes(5, 5 * PAGE);
    ours.write(3 * PAGE, &bytes);
    let child = cx.child("other", |cx| {
        let its = Attached::new(id, 0);
        cx.ready_unspoilt();
        cx.same(
            "in the other",
            its.read(3 * PAGE, bytes.len()),
            bytes.clone(),
        );
        its.write(SIZE - 9, b"from here");
        // Both that it has: its own, and its parent's by fork.
        cx.check(its.detach() && attached(id) >= 2, || "detach".to_owned());
    });
    cx.ready(|| ours.write(3 * PAGE + 1, b"other"));
    cx.same("its key", make(KEY), id);
    cx.same("contents", ours.read(3 * PAGE, bytes.len()), bytes.clone());
    cx.same("a hole", ours.read(12 * PAGE, PAGE), vec![0; PAGE]);
    cx.join("other", child);
    cx.same(
        "what the other wrote",
        ours.read(SIZE - 9, 9),
        b"from here".to_vec(),
    );
    cx.same("attached", attached(id), 1);
    cx.check(ours.detach(), || "detach".to_owned());
    cx.same("attached", attached(id), 0);
    remove(id);
}

fn read_only(cx: &Cx) {
    let id = make(0);
    let (ours, other) = (Attached::new(id, 0), Attached::new(id, SHM_RDONLY));
    ours.write(0, b"before");
    cx.ready(|| ours.write(0, b"BEFORE"));
    cx.same("contents", other.read(0, 6), b"before".to_vec());
    ours.write(PAGE, b"after");
    cx.same("seen", other.read(PAGE, 5), b"after".to_vec());
    let protect = [
        other.0.addr,
        PAGE,
        (libc::PROT_READ | libc::PROT_WRITE) as usize,
        0,
        0,
        0,
    ];
    let made_writable = os::syscall(libc::SYS_mprotect, protect);
    cx.same("errno of mprotect", os::errno(&made_writable), libc::EACCES);
    cx.same("attached", attached(id), 2);
    cx.check(other.detach() && ours.detach(), || "detach".to_owned());
    remove(id);
}

fn doomed(cx: &Cx) {
    let id = make(0);
    let ours = Attached::new(id, 0);
    remove(id);
    ours.write(0, b"before");
    cx.ready(|| ours.write(0, b"BEFORE"));
    cx.same("contents", ours.read(0, 6), b"before".to_vec());
}
