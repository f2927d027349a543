//! Who asked for an action by CRIU's RPC, and is to be answered.

use std::sync::Arc;

use freezeframe::Error;
use freezeframe_shims::criu::proto::{DumpResp, Kind, Resp, RestoreResp};
use freezeframe_shims::criu::{Client, errno};

use crate::actions::Act;
use crate::log;

/// The client, and what it has asked for.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) client: Arc<Client>,
    pub(crate) kind: Kind,
    /// It wants to be told of the steps.
    pub(crate) notified: bool,
}

impl Caller {
    /// The answer to what says no more than that it was done.
    pub(crate) fn done(&self) {
        self.answer(&Resp::done(self.kind));
    }

    /// What it has asked for.
    pub(crate) fn act(&self) -> Act {
        match self.kind {
            Kind::Restore => Act::Restore,
            Kind::CpuinfoDump | Kind::CpuinfoCheck => Act::Cpuinfo,
            _ => Act::Dump,
        }
    }

    /// The answer to a dump.
    pub(crate) fn dumped(&self) {
        self.answer(&Resp {
            dump: Some(DumpResp {
                restored: Some(false),
            }),
            ..Resp::done(self.kind)
        });
    }

    /// The answer to a restore.
    pub(crate) fn restored(&self, pid: i32) {
        self.answer(&Resp {
            restore: Some(RestoreResp { pid }),
            ..Resp::done(self.kind)
        });
    }

    /// The answer to what has failed.
    pub(crate) fn failed(&self, e: &Error) {
        let words = log::in_one_line(e, self.act());
        self.answer(&Resp::failed(self.kind, errno(e), words));
    }

    /// A client that has gone does not want to know.
    fn answer(&self, resp: &Resp) {
        let _ = self.client.send(resp);
    }
}
