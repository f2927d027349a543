//! Objects are made by the root of the tree, as the users who had made them.

use freezeframe_error::{Error, Result, ResultExt};
use freezeframe_inject::{Arg, Batch, OpRef};
use freezeframe_sys::ipc::{Sort, set_next_id};
use nix::unistd::{getegid, geteuid};

use super::{Owner, Record};
use crate::cx::MakeObject;
use crate::file::mqueue::{self, Queue};
use crate::file::shown;

/// Bytes of messages that are sent by one batch.
const AT_ONCE: usize = 1 << 20;

/// Appends a call that another user makes, whose that which it makes will be.
pub(crate) fn made_by(
    batch: &mut Batch,
    (uid, gid): (u32, u32),
    call: impl FnOnce(&mut Batch) -> OpRef,
) -> OpRef {
    let us = (geteuid().as_raw(), getegid().as_raw());
    let switch = |batch: &mut Batch, to: (u32, u32)| {
        let keep = Arg::Imm(u64::from(u32::MAX));
        if gid != us.1 {
            let args = [to.1.into(), to.1.into(), keep];
            batch.call("setresgid", libc::SYS_setresgid, args);
        }
        if uid != us.0 {
            let args = [to.0.into(), to.0.into(), keep];
            batch.call("setresuid", libc::SYS_setresuid, args);
        }
    };
    switch(batch, (uid, gid));
    let made = call(batch);
    switch(batch, us);
    made
}

pub(super) fn object(cx: &mut dyn MakeObject, object: &Record) -> Result<()> {
    match object {
        Record::Settings(_) => Ok(()),
        Record::Semaphores { id, owner, values } => {
            semaphores(cx, *id, owner, values).on(format!("System V semaphores {id}"))
        }
        Record::Messages {
            id,
            owner,
            limit,
            messages,
        } => message_queue(cx, *id, owner, *limit, messages)
            .on(format!("System V message queue {id}")),
        Record::Queue { name, queue } => {
            posix_queue(cx, name, queue).on(format!("POSIX message queue {}", shown(name)))
        }
    }
}

impl Owner {
    /// Appends the call that makes an object under its old id.
    fn make<const N: usize>(
        &self,
        cx: &mut dyn MakeObject,
        batch: &mut Batch,
        (sort, id): (Sort, i32),
        (name, nr): (&'static str, i64),
        args: [Arg; N],
    ) -> Result<()> {
        cx.segments().ipc().inside(|| set_next_id(sort, id))?;
        let got = made_by(batch, (self.cuid, self.cgid), |batch| {
            batch.call(name, nr, args)
        });
        batch.expect(got, id.into());
        Ok(())
    }
    fn flags(&self) -> Arg {
        let flags = libc::IPC_CREAT | libc::IPC_EXCL;
        (flags | (self.mode & 0o777) as i32).into()
    }
    /// What IPC_SET reads of struct semid64_ds and struct msqid64_ds.
    fn to_set(self, limit: u64) -> Vec<u8> {
        let mut ds = vec![0u8; 120];
        for (at, value) in [(4, self.uid), (8, self.gid), (20, self.mode & 0o777)] {
            ds[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        ds[88..96].copy_from_slice(&limit.to_ne_bytes());
        ds
    }
}

fn semaphores(cx: &mut dyn MakeObject, id: i32, owner: &Owner, values: &[u16]) -> Result<()> {
    let mut batch = Batch::new();
    let args = [owner.key.into(), values.len().into(), owner.flags()];
    let call = ("semget", libc::SYS_semget);
    owner.make(cx, &mut batch, (Sort::Semaphores, id), call, args)?;
    let mut control = |name: &'static str, command: i32, bytes: &[u8]| {
        let with = batch.data(bytes);
        let args = [id.into(), 0.into(), command.into(), with.into()];
        batch.call(name, libc::SYS_semctl, args);
    };
    if values.iter().any(|v| *v != 0) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
        control("semctl(SETALL)", libc::SETALL, &bytes);
    }
    if (owner.uid, owner.gid) != (owner.cuid, owner.cgid) {
        control("semctl(IPC_SET)", libc::IPC_SET, &owner.to_set(0));
    }
    cx.run(&batch).map(drop)
}

fn message_queue(
    cx: &mut dyn MakeObject,
    id: i32,
    owner: &Owner,
    limit: u64,
    messages: &[(i64, Vec<u8>)],
) -> Result<()> {
    let mut batch = Batch::new();
    let args = [owner.key.into(), owner.flags()];
    let call = ("msgget", libc::SYS_msgget);
    owner.make(cx, &mut batch, (Sort::Messages, id), call, args)?;
    send_all(cx, &mut batch, messages, |batch, (kind, text)| {
        let mut bytes = kind.to_ne_bytes().to_vec();
        bytes.extend(text);
        let message = batch.data(&bytes);
        let args = [
            id.into(),
            message.into(),
            text.len().into(),
            libc::IPC_NOWAIT.into(),
        ];
        batch.call("msgsnd", libc::SYS_msgsnd, args);
        text.len()
    })?;
    // The limit may be less than what waits.
    let ds = batch.data(&owner.to_set(limit));
    let args = [id.into(), libc::IPC_SET.into(), ds.into()];
    batch.call("msgctl(IPC_SET)", libc::SYS_msgctl, args);
    cx.run(&batch).map(drop)
}

fn posix_queue(cx: &mut dyn MakeObject, name: &[u8], queue: &Queue) -> Result<()> {
    let mut batch = Batch::new();
    let opened = queue.make(&mut batch, name);
    let fd = cx.run(&batch)?.raw(opened);
    let fd = Arg::from(i32::try_from(fd).map_err(|_| Error::bug("a descriptor that is none"))?);
    let mut batch = Batch::new();
    send_all(cx, &mut batch, &queue.messages, |batch, message| {
        mqueue::send(batch, fd, message)
    })?;
    batch.call("close", libc::SYS_close, [fd]);
    cx.run(&batch).map(drop)
}

/// Appends the sending of messages; `send` gives their lengths. What has grown large is run
/// at once.
fn send_all<T>(
    cx: &mut dyn MakeObject,
    batch: &mut Batch,
    messages: &[T],
    send: impl Fn(&mut Batch, &T) -> usize,
) -> Result<()> {
    let mut size = 0;
    for message in messages {
        // An entry of the batch is about as large as a short message.
        size += 128 + send(batch, message);
        if size > AT_ONCE {
            cx.run(&std::mem::take(batch))?;
            size = 0;
        }
    }
    Ok(())
}
