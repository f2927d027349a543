//! Process and thread ids as types of their own, so that they cannot be mixed
//! up with each other or with other numbers.

use std::fmt;

/// The id of a process (in the kernel's words, a thread group), as our own PID
/// namespace numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pid(pub i32);

/// The id of a thread, as our own PID namespace numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tid(pub i32);

impl Pid {
    /// The calling process.
    pub fn this() -> Pid {
        Pid(std::process::id() as i32)
    }

    /// The process's first thread, which has the same number.
    pub fn leader(self) -> Tid {
        Tid(self.0)
    }
}

impl Tid {
    /// The calling thread.
    pub fn this() -> Tid {
        Tid(nix::unistd::gettid().as_raw())
    }
}

impl From<Pid> for Tid {
    fn from(pid: Pid) -> Tid {
        pid.leader()
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn main_thread_and_others() {
        let pid = Pid::this();
        assert_eq!(Tid::from(pid).0, pid.0);
        let other = std::thread::spawn(Tid::this).join().unwrap();
        assert_ne!(other, pid.leader());
        assert_eq!(pid.to_string(), std::process::id().to_string());
    }
}
