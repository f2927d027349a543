//! The memory layout both sides share. Offsets are asserted at compile time,
//! because the assembly names them as numbers.

use std::mem::{offset_of, size_of};

/// What the stub does with a call's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OnResult {
    /// An error (-4095..=-1) ends the batch.
    StopOnError = 0,
    /// Whatever comes, go on.
    Ignore = 1,
    /// Anything but `Op::expect` ends the batch.
    Expect = 2,
}

/// How a successful call is undone if the tool dies before it disarms it
/// (live targets only; a shell dies as a whole).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Undo {
    /// Nothing to undo.
    None = 0,
    /// `munmap(result, undo_arg)`
    Munmap = 1,
    /// `close(result)`
    Close = 2,
    /// `close` both `i32`s at the address in `args[undo_arg]` (pipe2, socketpair).
    ClosePair = 3,
    /// `wait4(result, 0, __WALL, 0)`; a child that nobody steers exits at once.
    Reap = 4,
    /// This op itself takes back what an earlier op did (number `undo_arg` of
    /// its batch): before the call the stub disarms the undo entry that would
    /// make the same call with the same first argument. Before, because a
    /// descriptor number may be in use again the moment it is closed.
    Disarm = 5,
}

impl Undo {
    /// The number of the undoing call and its second argument (its first is the
    /// result of the call to be undone).
    pub fn call(self, undo_arg: u32) -> [u64; 2] {
        match self {
            Undo::None | Undo::Disarm => [0, 0],
            Undo::Munmap => [11, u64::from(undo_arg)],
            Undo::Close | Undo::ClosePair => [3, 0],
            Undo::Reap => [61, 0],
        }
    }
}

/// One syscall of a batch. Plain data in the target's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Op {
    /// Syscall number.
    pub nr: u64,
    /// Arguments; see `load` for those that are addresses of their value.
    pub args: [u64; 6],
    /// What the call returned (valid when the batch got that far).
    pub result: i64,
    /// Bit i (0..6): `args[i]` is the address of a u64 to load before the call.
    /// Bit 8+i: it is the address of an i32 (a descriptor made by pipe2, say).
    /// The stub replaces the argument in place.
    pub load: u32,
    /// An [`OnResult`].
    pub on_result: u32,
    /// The one result accepted under [`OnResult::Expect`].
    pub expect: i64,
    /// An [`Undo`].
    pub undo: u32,
    /// See [`Undo`].
    pub undo_arg: u32,
    /// For clone and clone3: the slot at which the child (result 0) starts to
    /// wait for its own batches. 0: this call makes no child.
    pub child: u64,
    /// For the undo of a live target: the number of the call that undoes this
    /// one, and that call's second argument ([`Undo::call`]).
    pub undo_call: [u64; 2],
}

/// `size_of::<Op>()`, as the assembly has it.
pub const OP_SIZE: usize = 112;

const _: () = {
    assert!(size_of::<Op>() == OP_SIZE);
    assert!(offset_of!(Op, nr) == 0);
    assert!(offset_of!(Op, args) == 8);
    assert!(offset_of!(Op, result) == 56);
    assert!(offset_of!(Op, load) == 64);
    assert!(offset_of!(Op, on_result) == 68);
    assert!(offset_of!(Op, expect) == 72);
    assert!(offset_of!(Op, undo) == 80);
    assert!(offset_of!(Op, undo_arg) == 84);
    assert!(offset_of!(Op, child) == 88);
    assert!(offset_of!(Op, undo_call) == 96);
};

impl Op {
    /// Appends the bytes of this op, as the stub reads them.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.nr.to_le_bytes());
        for a in self.args {
            out.extend_from_slice(&a.to_le_bytes());
        }
        out.extend_from_slice(&self.result.to_le_bytes());
        out.extend_from_slice(&self.load.to_le_bytes());
        out.extend_from_slice(&self.on_result.to_le_bytes());
        out.extend_from_slice(&self.expect.to_le_bytes());
        out.extend_from_slice(&self.undo.to_le_bytes());
        out.extend_from_slice(&self.undo_arg.to_le_bytes());
        out.extend_from_slice(&self.child.to_le_bytes());
        for r in self.undo_call {
            out.extend_from_slice(&r.to_le_bytes());
        }
    }
}
