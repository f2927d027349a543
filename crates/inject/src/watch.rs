//! A thread that keeps PTRACE_SEIZE from blocking for ever.
//!
//! PTRACE_SEIZE waits for an execve(2) of the target's process to be over
//! (`cred_guard_mutex`). An execve(2) of one of several threads waits for the
//! death of the others, and for their tracer to have waited for them. If we
//! seize one thread, and another calls execve(2) before we seize the next,
//! both wait for each other; no signal ends that, since the kernel restarts our
//! call. So another thread of ours waits for the dead (the kernel lets any
//! thread of the tracer's process do so).

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use freezeframe_sys::ids::Tid;

use crate::tracer;

/// A seize that lasts longer than this may be one of those.
const PATIENCE: Duration = Duration::from_millis(10);

#[derive(Debug, Default)]
pub(crate) struct State {
    now: Mutex<Now>,
    over: Condvar,
}

#[derive(Debug, Default)]
struct Now {
    /// Calls begun, and whether the last has not returned.
    calls: u64,
    inside: bool,
    seized: Vec<Tid>,
    over: bool,
}

impl State {
    fn with<T>(&self, f: impl FnOnce(&mut Now) -> T) -> T {
        f(&mut self.now.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn enter(&self) {
        self.with(|now| {
            now.calls += 1;
            now.inside = true;
        });
    }

    pub(crate) fn leave(&self, seized: Option<Tid>) {
        self.with(|now| {
            now.inside = false;
            now.seized.extend(seized);
        });
    }

    fn run(&self) {
        let mut last = 0;
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        while !now.over {
            (now, _) = self
                .over
                .wait_timeout(now, PATIENCE)
                .unwrap_or_else(PoisonError::into_inner);
            if now.inside && now.calls == last {
                now.seized.retain(|&tid| !tracer::wait_for_dead(tid));
            }
            last = now.calls;
        }
    }
}

/// The thread. Dropping this ends it.
#[derive(Debug)]
pub(crate) struct Watch {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts it. Without (no more threads allowed) all works but for that case.
    pub(crate) fn start() -> Watch {
        let state = Arc::new(State::default());
        let its = Arc::clone(&state);
        let builder = std::thread::Builder::new().name("ff-watch".into());
        let thread = builder.spawn(move || its.run()).ok();
        Watch { state, thread }
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.state.with(|now| now.over = true);
        self.state.over.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
