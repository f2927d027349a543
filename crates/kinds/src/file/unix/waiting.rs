//! What waits in connections that wait to be accepted.

use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::RawRecord;
use freezeframe_sys::fd;
use nix::fcntl::OFlag;

use super::ABOUT;
use super::dump::messages;
use super::record::{Message, Record};
use crate::cx::Orphan;

/// A listening socket of a tree that is to be killed.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: OwnedFd,
    pub(super) record: RawRecord,
}

impl Orphan for Listener {
    fn take(self: Box<Self>, _image: &str, _: &mut Vec<String>) -> Result<Option<RawRecord>> {
        let all = self.all();
        all.map_err(|e| e.context("data in connections that waited to be accepted is lost"))
    }
}

impl Listener {
    fn all(&self) -> Result<Option<RawRecord>> {
        let mut record = Record::read(&self.record)?;
        let kind = record.kind;
        let waiting = record.listening.iter_mut().flat_map(|l| &mut l.waiting);
        let flags = fd::status_flags(&self.socket)?;
        fd::set_status_flags(&self.socket, flags | OFlag::O_NONBLOCK)?;
        let mut taken = 0;
        for one in waiting {
            // Those before it that are left out end.
            while taken <= one.before {
                let gone = || Error::new(Kind::TargetChanged, "somebody else has accepted them");
                let (socket, _) = fd::accept(&self.socket)?.ok_or_else(gone)?;
                let found = messages(&socket, kind)?;
                one.queue = found.iter().map(Message::plain).collect();
                taken += 1;
            }
        }
        ABOUT.record(self.record.subject, &record).map(Some)
    }
}
