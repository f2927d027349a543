//! BPF programs of ours, which the kernel runs for us while we wait: nothing of them stays, and
//! they change nothing.
//!
//! # References
//! bpf(2), bpf-helpers(7); the kernel's include/uapi/linux/bpf.h
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use freezeframe_error::{Error, Result};

const TEST_RUN: i64 = 10;
const PER_CPU_ARRAY: u32 = 6;
const PROGRAM_TRACING: u32 = 26;
const PROGRAM_SYSCALL: u32 = 31;
pub(crate) const TRACE_ITER: u32 = 28;
/// `BPF_F_SLEEPABLE`
const SLEEPABLE: u32 = 1 << 4;

/// Commands that give a descriptor, and write nothing.
#[derive(Clone, Copy)]
pub(crate) enum Make {
    Map = 0,
    Program = 5,
    Link = 28,
    Iterator = 33,
}

impl Make {
    fn name(self) -> &'static str {
        match self {
            Make::Map => "bpf(BPF_MAP_CREATE)",
            Make::Program => "bpf(BPF_PROG_LOAD)",
            Make::Link => "bpf(BPF_LINK_CREATE)",
            Make::Iterator => "bpf(BPF_ITER_CREATE)",
        }
    }
}

/// `union bpf_attr`.
pub(crate) struct Attributes([u8; 128]);

impl Default for Attributes {
    fn default() -> Attributes {
        Attributes([0; 128])
    }
}

impl Attributes {
    pub(crate) fn word(&mut self, at: usize, value: u32) -> &mut Attributes {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn long(&mut self, at: usize, value: u64) -> &mut Attributes {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// What the attributes point to lives in the caller.
    pub(crate) fn make(&self, what: Make) -> Result<OwnedFd> {
        let command = what as i64;
        // SAFETY: these commands read the attributes, and what they point to (an address that is
        // none is EFAULT); they write nothing.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_ptr(), self.0.len()) };
        if fd < 0 {
            return Err(Error::last_os(what.name()));
        }
        // SAFETY: a descriptor the kernel has just given us (each `Make` does), which nobody else
        // knows.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}

/// Loads one that the kernel runs for each task, by the number of its function.
pub(crate) fn load_iterator(program: &[u64], of: u32) -> Result<OwnedFd> {
    load(PROGRAM_TRACING, program, |attributes| {
        attributes.word(68, TRACE_ITER).word(108, of);
    })
}

/// Loads one that runs when it is called by [`run`].
pub(crate) fn load_callable(program: &[u64]) -> Result<OwnedFd> {
    load(PROGRAM_SYSCALL, program, |attributes| {
        attributes.word(44, SLEEPABLE);
    })
}

fn load(kind: u32, program: &[u64], more: impl FnOnce(&mut Attributes)) -> Result<OwnedFd> {
    // Some helpers may be used only by programs that may be used under the GPL. Ours
    // may, if somebody likes: they are under the MIT licence.
    let license = c"Dual MIT/GPL";
    let mut attributes = Attributes::default();
    attributes.word(0, kind).word(4, program.len() as u32);
    attributes
        .long(8, program.as_ptr() as u64)
        .long(16, license.as_ptr() as u64);
    more(&mut attributes);
    attributes.make(Make::Program)
}

/// A map of one value of eight bytes for each CPU.
pub(crate) fn per_cpu_map() -> Result<OwnedFd> {
    let mut attributes = Attributes::default();
    attributes.word(0, PER_CPU_ARRAY).word(4, 4).word(8, 8);
    attributes.word(12, 1).make(Make::Map)
}

/// Runs a program on some words, which it may change; gives what it returns.
pub(crate) fn run(program: &OwnedFd, words: &mut [u64]) -> Result<u32> {
    let mut attributes = Attributes::default();
    attributes.word(0, program.as_raw_fd() as u32);
    attributes
        .word(40, size_of_val(words) as u32)
        .long(48, words.as_mut_ptr() as u64);
    // SAFETY: the kernel reads and writes the words, of the length that is stated, and writes
    // what the program returns into the attributes.
    let done = unsafe {
        let at = attributes.0.as_mut_ptr();
        libc::syscall(libc::SYS_bpf, TEST_RUN, at, attributes.0.len())
    };
    if done < 0 {
        return Err(Error::last_os("bpf(BPF_PROG_TEST_RUN)"));
    }
    let returned = attributes.0[4..8].try_into().expect("four");
    Ok(u32::from_le_bytes(returned))
}

/// Registers of the program: its argument and the first of calls, the others of calls, and those
/// that outlive calls.
pub(crate) const R0: u8 = 0;
pub(crate) const R1: u8 = 1;
pub(crate) const R2: u8 = 2;
pub(crate) const R3: u8 = 3;
pub(crate) const R6: u8 = 6;
pub(crate) const R7: u8 = 7;
pub(crate) const FRAME: u8 = 10;

pub(crate) const LOAD_4: u8 = 0x61;
pub(crate) const LOAD_8: u8 = 0x79;
pub(crate) const STORE_8: u8 = 0x7b;
pub(crate) const MOVE: u8 = 0xbf;
pub(crate) const SET: u8 = 0xb7;
pub(crate) const ADD: u8 = 0x07;
pub(crate) const JUMP_IF: u8 = 0x15;
pub(crate) const CALL: u8 = 0x85;
/// Loads what the instruction and the next one hold.
pub(crate) const LOAD_HELD: u8 = 0x18;
/// What is held is the descriptor of a map.
pub(crate) const OF_MAP: u8 = 1;
pub(crate) const JUMP: u8 = 0x05;
pub(crate) const JUMP_UNLESS: u8 = 0x55;
pub(crate) const EXIT: u8 = 0x95;

/// An instruction.
pub(crate) fn op(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([code, from << 4 | to, low, high, a, b, c, d])
}
