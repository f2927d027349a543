//! A queue as it is made anew, with what waits in it: one without a name, or of an IPC namespace
//! of the tree's own.
//!
//! # References
//! mq_getattr(3), mq_receive(3), mq_open(3), mq_send(3)

use std::os::fd::AsFd;

use freezeframe_error::{Error, Result};
use freezeframe_inject::{Arg, Batch, OpRef};
use freezeframe_sys::fd::Stat;
use freezeframe_sys::mqueue;
use serde::{Deserialize, Serialize};

use crate::cx::DumpCx;
use crate::file::shown;
use crate::namespace::ipc::made_by;

/// A queue that is made anew.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Queue {
    uid: u32,
    gid: u32,
    mode: u32,
    /// Messages at most.
    most: i64,
    /// Bytes of a message at most.
    size: i64,
    /// Priority and text.
    pub(crate) messages: Vec<(u32, Vec<u8>)>,
}

impl Queue {
    /// All of a queue but what waits in it, which has to wait until the tree is dead: a tree
    /// that is not to be killed is refused, if something does. Says whether.
    pub(crate) fn look(cx: &DumpCx<'_>, queue: impl AsFd, stat: &Stat) -> Result<(Queue, bool)> {
        let attributes = mqueue::attributes(queue)?;
        let waiting = attributes.waiting > 0;
        if waiting && !cx.options.kills {
            return Err(Error::unsupported(
                "it holds messages, which are read by taking them away: not supported where the tree is left running",
            ));
        }
        let queue = Queue {
            uid: stat.uid,
            gid: stat.gid,
            mode: stat.mode & 0o7777,
            most: attributes.most,
            size: attributes.size,
            messages: Vec::new(),
        };
        Ok((queue, waiting))
    }

    /// Takes what waits in it. The name is for people.
    pub(crate) fn take(&mut self, queue: impl AsFd, name: &[u8]) -> Result<()> {
        self.messages = mqueue::take_all(queue).map_err(|e| {
            let name = shown(name);
            e.context(format!(
                "what waited in the POSIX message queue {name} is lost"
            ))
        })?;
        Ok(())
    }

    /// Appends the calls that make it under this name, as the user who had made it; gives the
    /// descriptor.
    pub(crate) fn make(&self, batch: &mut Batch, name: &[u8]) -> OpRef {
        let name = batch.cstr(name);
        let attributes = [0, self.most, self.size, 0, 0, 0, 0, 0];
        let bytes: Vec<u8> = attributes.iter().flat_map(|n| n.to_ne_bytes()).collect();
        let attributes = batch.data(&bytes);
        let flags =
            libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let opened = made_by(batch, (self.uid, self.gid), |batch| {
            let args = [name.into(), flags.into(), 0o600.into(), attributes.into()];
            batch.call("mq_open", libc::SYS_mq_open, args)
        });
        let mode = [opened.into(), self.mode.into()];
        batch.call("fchmod", libc::SYS_fchmod, mode);
        opened
    }
}

/// Appends the call that sends a message to a queue; gives its length.
pub(crate) fn send(batch: &mut Batch, queue: Arg, (priority, text): &(u32, Vec<u8>)) -> usize {
    let message = batch.data(text);
    let args = [
        queue,
        message.into(),
        text.len().into(),
        (*priority).into(),
        0.into(),
    ];
    batch.call("mq_timedsend", libc::SYS_mq_timedsend, args);
    text.len()
}
