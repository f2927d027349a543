//! The vDSO of the running kernel: the one every process here has.

use freezeframe_error::{Error, Result};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::mem::Mem;
use freezeframe_sys::proc::ProcDir;

/// xxh3-64 of our own vDSO's code, which is every process's.
pub(crate) fn own_hash() -> Result<u64> {
    let us = Pid::this();
    let maps = ProcDir::open(us)?.maps()?;
    let vdso = maps
        .iter()
        .find(|m| m.path == b"[vdso]")
        .ok_or_else(|| Error::unsupported("this process has no vDSO to compare with"))?;
    let mut bytes = vec![0; vdso.len() as usize];
    Mem::open(us, false)?.read_exact_at(vdso.start, &mut bytes)?;
    Ok(xxhash_rust::xxh3::xxh3_64(&bytes))
}
