//! Descriptors on their way to a shell and from it.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use freezeframe_error::{Error, Kind, Result, ResultExt, SysExt};
use freezeframe_sys::pidfd::{pidfd_getfd, pidfd_open_thread};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::{Shells, TaskId};
use crate::batch::{Arg, Batch};

/// The most descriptors one message carries (SCM_MAX_FD).
const PER_MESSAGE: usize = 253;

impl Shells<'_> {
    /// Gives a descriptor of ours to a task's process (unix(7), SCM_RIGHTS);
    /// returns its number there. It is close-on-exec.
    pub fn send_fd(&mut self, task: TaskId, fd: BorrowedFd<'_>) -> Result<i32> {
        self.send_fds(task, &[fd]).map(|numbers| numbers[0])
    }

    /// Gives many.
    pub fn send_fds(&mut self, task: TaskId, fds: &[BorrowedFd<'_>]) -> Result<Vec<i32>> {
        let mut numbers = Vec::with_capacity(fds.len());
        for some in fds.chunks(PER_MESSAGE) {
            numbers.extend(self.send_some(task, some).on_task(self.tid(task).0)?);
        }
        Ok(numbers)
    }

    fn send_some(&mut self, task: TaskId, fds: &[BorrowedFd<'_>]) -> Result<Vec<i32>> {
        let socket = self.socket_of(task)?;
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();

        // struct msghdr: name, namelen, iov, iovlen, control, controllen, flags
        let control_len = 16 + (4 * raw.len()).next_multiple_of(8);
        let mut batch = Batch::new();
        let byte = batch.room(8);
        let iov = batch.data(&[0u64, 1].map(u64::to_le_bytes).concat());
        batch.pointer(iov, byte);
        let control = batch.room(control_len);
        let header = batch.data(
            &[0u64, 0, 0, 1, 0, control_len as u64, 0]
                .map(u64::to_le_bytes)
                .concat(),
        );
        batch.pointer(header.at(16), iov);
        batch.pointer(header.at(32), control);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let op = batch.call(
            "recvmsg(SCM_RIGHTS)",
            libc::SYS_recvmsg,
            [socket.into(), header.into(), flags.bits().into()],
        );
        batch.expect(op, 1);

        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        )
        .sys("sendmsg(SCM_RIGHTS)")?;
        let replies = self.run(task, &batch)?;
        let truncated = replies.u64(header.at(48)) & libc::MSG_CTRUNC as u64 != 0;
        let len = replies.u64(control) as usize;
        if truncated || len != 16 + 4 * raw.len() {
            let message = format!(
                "not all of {} descriptors arrived (RLIMIT_NOFILE)",
                raw.len()
            );
            return Err(Error::new(Kind::NoSpace, message));
        }
        let numbers = replies.bytes(control)[16..len].chunks_exact(4);
        Ok(numbers
            .map(|n| i32::from_le_bytes(n.try_into().expect("4 bytes")))
            .collect())
    }

    /// A duplicate, here, of descriptor `fd` of a task's process.
    pub fn get_fd(&self, task: TaskId, fd: i32) -> Result<OwnedFd> {
        let tid = self.tid(task);
        match pidfd_getfd(self.pidfd(task), fd) {
            // A leader that has ended before its threads has no descriptors.
            Err(_) if tid != self.pid(task).leader() => {
                pidfd_open_thread(tid).and_then(|pidfd| pidfd_getfd(pidfd, fd))
            }
            other => other,
        }
        .on_task(tid.0)
    }

    /// The number of the one descriptor a shell has for our own use, if it has
    /// not been closed.
    pub fn service_fd(&self, task: TaskId) -> Option<i32> {
        self.sockets.get(&self.process(task).files).copied()
    }

    /// Moves that descriptor to a number not below `at_or_above`; returns it.
    /// Processes forked later have it there too.
    pub fn move_service_fds(&mut self, task: TaskId, at_or_above: i32) -> Result<i32> {
        let old = self.socket_of(task)?;
        let mut batch = Batch::new();
        let new = batch.call(
            "fcntl(F_DUPFD_CLOEXEC)",
            libc::SYS_fcntl,
            [old.into(), libc::F_DUPFD_CLOEXEC.into(), at_or_above.into()],
        );
        batch.call("close(service)", libc::SYS_close, [Arg::from(old)]);
        let new = self.run(task, &batch)?.raw(new) as i32;
        let files = self.process(task).files;
        self.sockets.insert(files, new);
        Ok(new)
    }

    /// Closes that descriptor; nothing can be sent to the process any more.
    pub fn close_service_fds(&mut self, task: TaskId) -> Result<()> {
        if let Some(old) = self.service_fd(task) {
            let mut batch = Batch::new();
            batch.call("close(service)", libc::SYS_close, [Arg::from(old)]);
            self.run(task, &batch)?;
            let files = self.process(task).files;
            self.sockets.remove(&files);
        }
        Ok(())
    }

    fn socket_of(&self, task: TaskId) -> Result<i32> {
        self.service_fd(task)
            .ok_or_else(|| Error::bug("the service descriptor is closed").on_task(self.tid(task).0))
    }
}
