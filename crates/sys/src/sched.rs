//! Scheduling attributes of threads, ours and others'.
//!
//! # References
//! sched_setattr(2), sched_setaffinity(2)
#![allow(unsafe_code)]

use crate::ids::Tid;
use freezeframe_error::{Error, Kind, Result};

/// How a thread is scheduled (`struct sched_attr`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct SchedAttr {
    /// `SCHED_OTHER`, `SCHED_FIFO`, ...
    pub policy: u32,
    /// `SCHED_FLAG_*`; of them only SCHED_FLAG_RESET_ON_FORK is state, and the
    /// deadline ones.
    pub flags: u64,
    /// Nice value, of SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// Priority, of SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// Runtime in nanoseconds: of SCHED_DEADLINE; for SCHED_OTHER, since Linux
    /// 6.12, the slice.
    pub runtime: u64,
    /// Deadline in nanoseconds, of SCHED_DEADLINE.
    pub deadline: u64,
    /// Period in nanoseconds, of SCHED_DEADLINE.
    pub period: u64,
    /// Lower clamp of utilization; taken only with SCHED_FLAG_UTIL_CLAMP_MIN.
    pub util_min: u32,
    /// Upper clamp of utilization; taken only with SCHED_FLAG_UTIL_CLAMP_MAX.
    pub util_max: u32,
}

/// The kernel's `struct sched_attr`, version 1.
#[repr(C)]
#[derive(Default)]
struct Raw {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

const _: () = assert!(size_of::<Raw>() == 56);

/// How a thread is scheduled. Needs no right on it.
pub fn sched_getattr(tid: Tid) -> Result<SchedAttr> {
    let mut raw = Raw::default();
    // SAFETY: the kernel writes at most the 56 bytes stated, which `raw` has.
    let done = unsafe { libc::syscall(libc::SYS_sched_getattr, tid.0, &raw mut raw, 56u32, 0u32) };
    if done < 0 {
        return Err(Error::last_os("sched_getattr").on_task(tid.0));
    }
    Ok(SchedAttr {
        policy: raw.policy,
        flags: raw.flags,
        nice: raw.nice,
        priority: raw.priority,
        runtime: raw.runtime,
        deadline: raw.deadline,
        period: raw.period,
        util_min: raw.util_min,
        util_max: raw.util_max,
    })
}

/// Sets how a thread is scheduled. EPERM without CAP_SYS_NICE for what the
/// thread's RLIMIT_NICE and RLIMIT_RTPRIO do not allow, and for others' threads.
pub fn sched_setattr(tid: Tid, attr: &SchedAttr) -> Result<()> {
    let raw = Raw {
        size: 56,
        policy: attr.policy,
        flags: attr.flags,
        nice: attr.nice,
        priority: attr.priority,
        runtime: attr.runtime,
        deadline: attr.deadline,
        period: attr.period,
        util_min: attr.util_min,
        util_max: attr.util_max,
    };
    // SAFETY: the kernel reads the 56 bytes of `raw`.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, tid.0, &raw const raw, 0u32) };
    if done < 0 {
        return Err(Error::last_os("sched_setattr").on_task(tid.0));
    }
    Ok(())
}

/// The CPUs a thread may run on: bit n of word n/64. As long as the kernel's masks are.
pub fn sched_getaffinity(tid: Tid) -> Result<Vec<u64>> {
    let mut mask = vec![0u64; 16];
    loop {
        // SAFETY: the kernel writes at most as many bytes as `mask` has.
        let bytes = unsafe {
            libc::syscall(
                libc::SYS_sched_getaffinity,
                tid.0,
                mask.len() * 8,
                mask.as_mut_ptr(),
            )
        };
        if bytes >= 0 {
            mask.truncate((bytes as usize).div_ceil(8));
            return Ok(mask);
        }
        let e = Error::last_os("sched_getaffinity").on_task(tid.0);
        // EINVAL: the kernel's masks are longer.
        if e.errno() != Some(libc::EINVAL) || mask.len() >= 1 << 16 {
            return Err(e);
        }
        mask = vec![0; mask.len() * 2];
    }
}

/// Sets the CPUs a thread may run on. EINVAL: none of them exists here, or is allowed.
pub fn sched_setaffinity(tid: Tid, mask: &[u64]) -> Result<()> {
    // SAFETY: the kernel reads as many bytes as `mask` has.
    let done = unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            tid.0,
            size_of_val(mask),
            mask.as_ptr(),
        )
    };
    if done < 0 {
        return Err(Error::last_os("sched_setaffinity").on_task(tid.0));
    }
    Ok(())
}

/// The mask of one CPU, for [`sched_setaffinity`].
pub fn only_cpu(cpu: u32) -> Vec<u64> {
    let mut mask = vec![0; cpu as usize / 64 + 1];
    mask[cpu as usize / 64] = 1 << (cpu % 64);
    mask
}

/// The CPU the calling thread runs on at this moment.
pub fn current_cpu() -> Result<u32> {
    // SAFETY: the call takes nothing and touches no memory of ours.
    let cpu = unsafe { libc::sched_getcpu() };
    u32::try_from(cpu).map_err(|_| Error::new(Kind::KernelLacks, "sched_getcpu failed"))
}

/// The CPUs that this machine may ever have.
pub fn possible_cpus() -> Result<Vec<u32>> {
    listed("/sys/devices/system/cpu/possible")
}

/// The CPUs that work now.
pub fn online_cpus() -> Result<Vec<u32>> {
    listed("/sys/devices/system/cpu/online")
}

fn listed(path: &str) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", e).on(path))?;
    cpus(text.trim()).ok_or_else(|| Error::bug("a list of CPUs that is none").on(path))
}

/// Those that a list like `0-3,6` names.
fn cpus(list: &str) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        all.extend(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        assert_eq!(cpus("0-1"), Some(vec![0, 1]));
        assert_eq!(cpus("0,2-4"), Some(vec![0, 2, 3, 4]));
        assert_eq!(cpus(""), None);
    }

    #[test]
    fn attributes_of_a_thread() {
        std::thread::spawn(|| {
            let tid = Tid::this();
            let before = sched_getattr(tid).unwrap();
            assert_eq!(before.policy, libc::SCHED_OTHER as u32);
            let batch = SchedAttr {
                policy: libc::SCHED_BATCH as u32,
                nice: before.nice + 1,
                ..before
            };
            sched_setattr(tid, &batch).unwrap();
            let after = sched_getattr(tid).unwrap();
            assert_eq!((after.policy, after.nice), (batch.policy, batch.nice));
            let task = crate::proc::ProcDir::open(crate::Pid::this()).unwrap();
            let stat = task.task(tid).unwrap().stat().unwrap();
            assert_eq!((stat.policy, stat.nice), (3, i64::from(batch.nice)));
        })
        .join()
        .unwrap();
        let gone = sched_getattr(Tid(0x3fff_ffff)).unwrap_err();
        assert_eq!(gone.kind(), Kind::TargetGone);
    }

    #[test]
    fn affinity_of_a_thread() {
        std::thread::spawn(|| {
            let tid = Tid::this();
            let before = sched_getaffinity(tid).unwrap();
            assert!(before.iter().any(|word| *word != 0));
            let cpu = current_cpu().unwrap();
            sched_setaffinity(tid, &only_cpu(cpu)).unwrap();
            let now = sched_getaffinity(tid).unwrap();
            assert_eq!(now.iter().map(|w| w.count_ones()).sum::<u32>(), 1);
            assert_eq!(now[cpu as usize / 64], 1 << (cpu % 64));
            assert_eq!(current_cpu().unwrap(), cpu);
            assert_eq!(only_cpu(65), [0, 2]);
            sched_setaffinity(tid, &before).unwrap();
            assert_eq!(sched_getaffinity(tid).unwrap(), before);
            assert!(sched_setaffinity(tid, &[0]).is_err());
        })
        .join()
        .unwrap();
    }
}
