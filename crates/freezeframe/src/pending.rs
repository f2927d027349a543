//! The engine's interface, until the engine crate compiles. Then this file goes.
#![allow(missing_docs, clippy::missing_errors_doc, unreachable_pub)]

#[path = "../../engine/src/events.rs"]
pub mod events;

pub mod kinds {
    use std::collections::HashMap;
    use std::os::fd::RawFd;

    #[derive(Clone, Debug, Default)]
    pub struct DumpOptions {
        pub shell_job: bool,
        pub external: Vec<String>,
        pub file_locks: bool,
        pub ghost_limit: u64,
        pub link_remap: bool,
        pub ext_unix_sk: bool,
        pub tcp_established: bool,
    }

    #[derive(Clone, Debug, Default)]
    pub struct RestoreOptions {
        pub shell_job: bool,
        pub inherit: HashMap<String, RawFd>,
        pub file_locks: bool,
    }
}

pub mod dump {
    use super::events::Events;
    use super::kinds::DumpOptions;
    use freezeframe_error::{Error, Phase, Result, Target};
    use std::path::PathBuf;
    use std::time::Duration;

    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub enum After {
        #[default]
        Kill,
        Run,
        Stop,
    }

    #[derive(Clone, Debug)]
    pub struct DumpRequest {
        pub pid: i32,
        pub images_dir: PathBuf,
        pub after: After,
        pub timeout: Duration,
        pub sync: bool,
        pub options: DumpOptions,
    }

    #[derive(Clone, Debug, Default)]
    pub struct DumpReport {
        pub processes: u64,
        pub threads: u64,
        pub pages_scanned: u64,
        pub pages_written: u64,
        pub pages_shared: u64,
        pub pages_zero: u64,
        pub freezing: Duration,
        pub frozen: Duration,
        pub memory: Duration,
        pub warnings: Vec<String>,
    }

    pub fn run(request: &DumpRequest, _events: &dyn Events) -> Result<DumpReport> {
        Err(Error::unsupported("the engine is still being built")
            .in_phase(Phase::Plan)
            .on_task(request.pid)
            .leaving(Target::Untouched))
    }
}

pub mod restore {
    use super::events::Events;
    use super::kinds::RestoreOptions;
    use freezeframe_error::{Error, Phase, Result, Target};
    use std::path::PathBuf;
    use std::time::Duration;

    #[derive(Clone, Debug)]
    pub struct RestoreRequest {
        pub images_dir: PathBuf,
        pub sibling: bool,
        pub leave_stopped: bool,
        pub timeout: Duration,
        pub options: RestoreOptions,
    }

    #[derive(Clone, Debug, Default)]
    pub struct RestoreReport {
        pub pid: i32,
        pub processes: u64,
        pub threads: u64,
        pub pages_restored: u64,
        pub forking: Duration,
        pub total: Duration,
        pub warnings: Vec<String>,
    }

    pub fn run(request: &RestoreRequest, _events: &dyn Events) -> Result<RestoreReport> {
        freezeframe_image::Image::open(&request.images_dir)
            .map_err(|e| e.leaving(Target::Untouched))?;
        Err(Error::unsupported("the engine is still being built")
            .in_phase(Phase::Load)
            .leaving(Target::Untouched))
    }
}
