//! A batch of syscalls to run in another process, built in safe Rust.
//!
//! Arguments may name data carried with the batch ([`DataRef`]) or results of
//! earlier calls ([`OpRef`]); a transport ([`crate::live`], [`crate::shell`])
//! decides where code and data lie and calls [`Batch::place`] to get the bytes.

use std::borrow::Cow;

use freezeframe_error::{Error, Result};
use freezeframe_stub::layout::{OP_SIZE, OnResult, Op, Undo};

/// How much longer than itself a batch is [for a visitor](Batch::for_a_visitor), at most.
pub(crate) const VISITORS_MORE: usize = 2 * OP_SIZE + 48;

/// A call within a [`Batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpRef(pub(crate) usize);

/// A piece of a batch's data area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataRef {
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

impl DataRef {
    /// The part of this piece that starts `offset` bytes in.
    pub fn at(self, offset: usize) -> DataRef {
        assert!(offset <= self.len, "DataRef::at past its end");
        DataRef {
            offset: self.offset + offset,
            len: self.len - offset,
        }
    }
    /// Its length in bytes.
    pub fn len(self) -> usize {
        self.len
    }
    /// Whether it has no bytes.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
}

/// One argument of a remote call.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A number, or an address that is valid in the target.
    Imm(u64),
    /// What an earlier call of this batch returned.
    Result(OpRef),
    /// The address, in the target, of a piece of the batch's data.
    Data(DataRef),
    /// The u64 an earlier call of this batch has left in the data area.
    Load64(DataRef),
    /// The i32 (a descriptor, say) an earlier call has left in the data area.
    Load32(DataRef),
}

macro_rules! imm {
    ($($t:ty),*) => {$(
        impl From<$t> for Arg {
            fn from(v: $t) -> Arg { Arg::Imm(v as i64 as u64) }
        }
    )*};
}
imm!(i32, u32, i64, usize, isize, u8, u16);
impl From<u64> for Arg {
    fn from(v: u64) -> Arg {
        Arg::Imm(v)
    }
}
impl From<OpRef> for Arg {
    fn from(v: OpRef) -> Arg {
        Arg::Result(v)
    }
}
impl From<DataRef> for Arg {
    fn from(v: DataRef) -> Arg {
        Arg::Data(v)
    }
}

#[derive(Clone, Debug)]
struct Call {
    nr: i64,
    args: [Arg; 6],
    on_result: OnResult,
    expect: i64,
    undo: Undo,
    undo_arg: u32,
    child: u64,
    label: Cow<'static, str>,
}

/// A list of calls with the data they need.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    calls: Vec<Call>,
    data: Vec<u8>,
    /// (where in `data` an address goes, the offset in `data` it is to point to)
    pointers: Vec<(usize, usize)>,
}

/// The bytes of a batch placed at an address.
#[derive(Debug)]
pub struct Placed {
    /// Ops, then data; to be written at the address given to [`Batch::place`].
    pub bytes: Vec<u8>,
    /// How many ops lie at the start of `bytes`.
    pub ops: usize,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Whether there is nothing to call.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// How many calls there are.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Carries `bytes` along, 8-byte aligned.
    pub fn data(&mut self, bytes: &[u8]) -> DataRef {
        let offset = self.data.len().next_multiple_of(8);
        self.data.resize(offset, 0);
        self.data.extend_from_slice(bytes);
        DataRef {
            offset,
            len: bytes.len(),
        }
    }

    /// Carries a NUL-terminated string along.
    pub fn cstr(&mut self, s: &[u8]) -> DataRef {
        let mut v = s.to_vec();
        v.push(0);
        self.data(&v)
    }

    /// Reserves `len` zeroed bytes, 8-byte aligned, for a call to fill.
    pub fn room(&mut self, len: usize) -> DataRef {
        let offset = self.data.len().next_multiple_of(8);
        self.data.resize(offset + len, 0);
        DataRef { offset, len }
    }

    /// Replaces the bytes of a piece carried along. Panics unless `bytes` fit.
    pub fn set(&mut self, piece: DataRef, bytes: &[u8]) {
        assert!(bytes.len() <= piece.len, "Batch::set past the piece's end");
        self.data[piece.offset..piece.offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Stores the address, in the target, of `to` in the first 8 bytes of `at`
    /// (an iovec's base, say).
    pub fn pointer(&mut self, at: DataRef, to: DataRef) {
        assert!(at.len >= 8, "Batch::pointer in less than 8 bytes");
        self.pointers.push((at.offset, to.offset));
    }

    /// The syscall numbers, in order.
    pub fn numbers(&self) -> impl Iterator<Item = i64> + '_ {
        self.calls.iter().map(|c| c.nr)
    }

    /// Adds a call. An error it returns ends the batch. `label` names it in
    /// errors, as `setitimer(ITIMER_REAL)`.
    pub fn call<const N: usize>(
        &mut self,
        label: impl Into<Cow<'static, str>>,
        nr: i64,
        args: [Arg; N],
    ) -> OpRef {
        const { assert!(N <= 6) };
        let mut all = [Arg::Imm(0); 6];
        all[..N].copy_from_slice(&args);
        self.calls.push(Call {
            nr,
            args: all,
            on_result: OnResult::StopOnError,
            expect: 0,
            undo: Undo::None,
            undo_arg: 0,
            child: 0,
            label: label.into(),
        });
        OpRef(self.calls.len() - 1)
    }

    /// Lets the call fail: its result is looked at by the caller.
    pub fn may_fail(&mut self, op: OpRef) -> OpRef {
        self.calls[op.0].on_result = OnResult::Ignore;
        op
    }

    /// Ends the batch unless the call returns exactly `result`.
    pub fn expect(&mut self, op: OpRef, result: i64) -> OpRef {
        self.calls[op.0].on_result = OnResult::Expect;
        self.calls[op.0].expect = result;
        op
    }

    /// States how the stub undoes this call if we die (live targets only).
    pub fn undo(&mut self, op: OpRef, undo: Undo, arg: u32) -> OpRef {
        self.calls[op.0].undo = undo;
        self.calls[op.0].undo_arg = arg;
        op
    }

    /// This call takes back what `earlier` did, so its undo entry is disarmed first.
    pub fn takes_back(&mut self, op: OpRef, earlier: OpRef) -> OpRef {
        self.undo(op, Undo::Disarm, earlier.0 as u32)
    }

    /// For a clone in a shell: the slot address at which the child waits.
    pub fn child_slot(&mut self, op: OpRef, slot: u64) -> OpRef {
        self.calls[op.0].child = slot;
        op
    }

    /// The label of a call.
    pub fn label(&self, op: OpRef) -> &str {
        &self.calls[op.0].label
    }

    /// All references to calls, in order.
    pub fn ops(&self) -> impl Iterator<Item = OpRef> + use<> {
        (0..self.calls.len()).map(OpRef)
    }

    /// How many bytes [`Batch::place`] will make.
    pub fn placed_len(&self) -> usize {
        self.calls.len() * OP_SIZE + self.data.len().next_multiple_of(16)
    }

    /// Whether the batch goes on after call `index` returned `result`, as the
    /// stub decides it.
    pub(crate) fn accepts(&self, index: usize, result: i64) -> bool {
        let call = &self.calls[index];
        match call.on_result {
            OnResult::StopOnError => !(-4095..0).contains(&result),
            OnResult::Ignore => true,
            OnResult::Expect => result == call.expect,
        }
    }

    /// The same calls, none of which ends the batch, and then two that tell us of its end by
    /// `socket` and wait until our end of that is closed.
    pub(crate) fn for_a_visitor(&self, socket: i32) -> Batch {
        let mut all = self.clone();
        for call in &mut all.calls {
            call.on_result = OnResult::Ignore;
        }
        let word = all.data(&1u64.to_le_bytes());
        // struct pollfd { fd: i32, events: u16, revents: u16 }
        let mut pollfd = socket.to_le_bytes().to_vec();
        pollfd.extend_from_slice(&(libc::POLLRDHUP as u32).to_le_bytes());
        let pollfd = all.data(&pollfd);
        let tell: [Arg; 6] = [
            socket.into(),
            word.into(),
            8.into(),
            libc::MSG_NOSIGNAL.into(),
            0.into(),
            0.into(),
        ];
        let tell = all.call("sendto", libc::SYS_sendto, tell);
        all.may_fail(tell);
        let wait = [pollfd.into(), 1.into(), 0.into(), 0.into(), 0.into()];
        let wait = all.call("ppoll", libc::SYS_ppoll, wait);
        all.may_fail(wait);
        all
    }

    /// How many of the calls were accepted one after the other, had each been made whatever the
    /// one before returned.
    pub(crate) fn accepted(&self, replies: &Replies) -> usize {
        let mut indices = 0..self.calls.len();
        let ended = indices.find(|&i| !self.accepts(i, replies.results[i]));
        ended.unwrap_or(self.calls.len())
    }

    /// How many undo entries its calls can make.
    pub(crate) fn undo_entries(&self) -> usize {
        let entries = |call: &Call| match call.undo {
            Undo::None | Undo::Disarm => 0,
            Undo::Munmap | Undo::Close | Undo::Reap => 1,
            Undo::ClosePair => 2,
        };
        self.calls.iter().map(entries).sum()
    }

    /// Whether it has calls that make children.
    pub(crate) fn makes_children(&self) -> bool {
        self.calls
            .iter()
            .any(|c| c.undo == Undo::Reap || c.child != 0)
    }

    /// The bytes of this batch for address `at` (16-byte aligned) of the target.
    pub fn place(&self, at: u64) -> Placed {
        let data_at = at + (self.calls.len() * OP_SIZE) as u64;
        let mut bytes = Vec::with_capacity(self.placed_len());
        for call in &self.calls {
            let mut op = Op {
                nr: call.nr as u64,
                on_result: call.on_result as u32,
                expect: call.expect,
                undo: call.undo as u32,
                undo_arg: call.undo_arg,
                // A live child that nobody steers must know that it is one.
                child: match call.undo {
                    Undo::Reap => call.child.max(1),
                    _ => call.child,
                },
                undo_call: call.undo.call(call.undo_arg),
                ..Op::default()
            };
            for (i, arg) in call.args.iter().enumerate() {
                op.args[i] = match *arg {
                    Arg::Imm(v) => v,
                    Arg::Data(d) => data_at + d.offset as u64,
                    Arg::Result(r) => {
                        op.load |= 1 << i;
                        at + (r.0 * OP_SIZE) as u64 + 56
                    }
                    Arg::Load64(d) => {
                        op.load |= 1 << i;
                        data_at + d.offset as u64
                    }
                    Arg::Load32(d) => {
                        op.load |= 1 << (8 + i);
                        data_at + d.offset as u64
                    }
                };
            }
            op.write_to(&mut bytes);
        }
        let data_from = bytes.len();
        bytes.extend_from_slice(&self.data);
        for &(at, to) in &self.pointers {
            let address = data_at + to as u64;
            bytes[data_from + at..][..8].copy_from_slice(&address.to_le_bytes());
        }
        bytes.resize(self.placed_len(), 0);
        Placed {
            bytes,
            ops: self.calls.len(),
        }
    }

    /// Reads results and data back from the bytes of a batch that ran up to
    /// (not including) call `done`.
    pub fn replies(&self, bytes: &[u8], done: usize) -> Replies {
        let results = (0..self.calls.len())
            .map(|i| {
                let at = i * OP_SIZE + 56;
                i64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
            })
            .collect();
        let data_at = self.calls.len() * OP_SIZE;
        Replies {
            results,
            data: bytes[data_at..data_at + self.data.len()].to_vec(),
            done,
        }
    }

    /// An error naming the call that ended the batch, if one did.
    pub fn check(&self, replies: &Replies) -> Result<()> {
        if replies.done >= self.calls.len() {
            return Ok(());
        }
        let call = &self.calls[replies.done];
        let result = replies.results[replies.done];
        if (-4095..0).contains(&result) {
            return Err(Error::syscall(call.label.clone(), -result as i32));
        }
        Err(Error::bug(format!(
            "{} returned {result}, not {}",
            call.label, call.expect
        )))
    }
}

/// What the calls of a batch returned.
#[derive(Clone, Debug)]
pub struct Replies {
    results: Vec<i64>,
    data: Vec<u8>,
    /// How many calls were made and accepted.
    pub done: usize,
}

impl Replies {
    /// The result of a call: a value, or the errno.
    pub fn result(&self, op: OpRef) -> std::result::Result<i64, i32> {
        let r = self.results[op.0];
        if (-4095..0).contains(&r) {
            Err(-r as i32)
        } else {
            Ok(r)
        }
    }
    /// The result of a call as it was returned.
    pub fn raw(&self, op: OpRef) -> i64 {
        self.results[op.0]
    }
    /// A piece of the data area, as the calls left it.
    pub fn bytes(&self, d: DataRef) -> &[u8] {
        &self.data[d.offset..d.offset + d.len]
    }
    /// A u64 of the data area.
    pub fn u64(&self, d: DataRef) -> u64 {
        u64::from_le_bytes(self.bytes(d)[..8].try_into().expect("8 bytes"))
    }
    /// A u32 of the data area.
    pub fn u32(&self, d: DataRef) -> u32 {
        u32::from_le_bytes(self.bytes(d)[..4].try_into().expect("4 bytes"))
    }
    /// An i32 of the data area.
    pub fn i32(&self, d: DataRef) -> i32 {
        self.u32(d) as i32
    }
}
