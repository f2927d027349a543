//! Resource limits of processes, by prlimit(2).
//!
//! Of another user's process they need CAP_SYS_RESOURCE, to read too:
//! [`crate::proc::TaskFiles::limits`] reads them without it.
#![allow(unsafe_code)]

use crate::ids::Pid;
use crate::proc::Limit;
use freezeframe_error::{Error, Result};

/// Number of limits (`RLIM_NLIMITS`).
pub const COUNT: usize = 16;

/// A limit of a process. `resource` is one of `RLIMIT_*`.
pub fn get(pid: Pid, resource: u32) -> Result<Limit> {
    let mut old = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: a null new limit is allowed; the kernel writes one rlimit64.
    let done = unsafe { libc::prlimit64(pid.0, resource, std::ptr::null(), &raw mut old) };
    if done < 0 {
        return Err(Error::last_os("prlimit64").on_task(pid.0));
    }
    Ok(Limit {
        soft: old.rlim_cur,
        hard: old.rlim_max,
    })
}

/// Sets a limit of a process. EPERM: above the hard one without CAP_SYS_RESOURCE.
pub fn set(pid: Pid, resource: u32, limit: Limit) -> Result<()> {
    let new = libc::rlimit64 {
        rlim_cur: limit.soft,
        rlim_max: limit.hard,
    };
    // SAFETY: the kernel reads one rlimit64; a null old limit is allowed.
    let done = unsafe { libc::prlimit64(pid.0, resource, &raw const new, std::ptr::null_mut()) };
    if done < 0 {
        return Err(Error::last_os("prlimit64").on_task(pid.0));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_child() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let pid = Pid(child.id() as i32);
        let proc = crate::proc::ProcDir::open(pid).unwrap();
        let limits = proc.limits().unwrap();
        for (resource, limit) in limits.iter().enumerate() {
            assert_eq!(get(pid, resource as u32).unwrap(), *limit);
        }
        let limit = Limit { soft: 7, hard: 9 };
        set(pid, libc::RLIMIT_NOFILE, limit).unwrap();
        let read = proc.limits().unwrap()[libc::RLIMIT_NOFILE as usize];
        let invalid = set(pid, libc::RLIMIT_NOFILE, Limit { soft: 2, hard: 1 });
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(read, limit);
        assert_eq!(invalid.unwrap_err().errno(), Some(libc::EINVAL));
        assert_eq!(limits.len(), COUNT);
    }
}
