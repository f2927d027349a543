//! The places where we may die.
//!
//! Each operation of the injection that changes anything is followed by
//! [`step`]. With the feature `step-kill` (tests only) the process kills itself
//! at the step whose number `FREEZEFRAME_KILL_AT` gives, having sent SIGUSR1 to
//! the thread `FREEZEFRAME_KILL_SIGNAL` names, if it does; without the feature the
//! call is nothing.

#[cfg(feature = "step-kill")]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use freezeframe_sys::ids::Tid;
    use freezeframe_sys::pidfd;

    static COUNT: AtomicU64 = AtomicU64::new(0);

    fn setting(name: &str) -> u64 {
        std::env::var(name)
            .ok()
            .and_then(|v| v.parse().ok())
            .unwrap_or(0)
    }

    pub(super) fn step(name: &'static str) {
        static AT: OnceLock<u64> = OnceLock::new();
        let n = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
        if n == *AT.get_or_init(|| setting("FREEZEFRAME_KILL_AT")) {
            // The harness reads where we died; one write, so that it is whole.
            let _ = nix::unistd::write(std::io::stderr(), format!("step {n} {name}\n").as_bytes());
            let tid = setting("FREEZEFRAME_KILL_SIGNAL") as i32;
            if tid != 0
                && let Ok(thread) = pidfd::pidfd_open_thread(Tid(tid))
            {
                let _ = pidfd::pidfd_send_signal(&thread, libc::SIGUSR1);
            }
            let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::SIGKILL);
            loop {
                std::thread::park();
            }
        }
    }

    pub(super) fn count() -> u64 {
        COUNT.load(Ordering::Relaxed)
    }
}

/// Marks the end of one operation, named for the reports of the tests.
#[inline(always)]
pub(crate) fn step(name: &'static str) {
    #[cfg(feature = "step-kill")]
    armed::step(name);
    #[cfg(not(feature = "step-kill"))]
    let _ = name;
}

/// How many steps were made so far.
#[cfg(feature = "step-kill")]
pub fn count() -> u64 {
    armed::count()
}

/// A step of a test's own.
#[cfg(feature = "step-kill")]
pub fn mark(name: &'static str) {
    step(name);
}
