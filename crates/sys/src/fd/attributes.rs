//! What a file has beside its contents: extended attributes and times.

use freezeframe_error::{Error, Result, ResultExt};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd};

/// An extended attribute: its name, as in xattr(7) without a NUL, and its value.
pub type Attribute = (Vec<u8>, Vec<u8>);

/// Every extended attribute we may see (flistxattr(2), fgetxattr(2)). None where
/// the file system has no such thing. Not of an `O_PATH` descriptor.
pub fn attributes(fd: impl AsFd) -> Result<Vec<Attribute>> {
    let raw = fd.as_fd().as_raw_fd();
    let list = match sized("flistxattr", |to| {
        // SAFETY: the kernel writes at most as many bytes as `to` has.
        unsafe { libc::flistxattr(raw, to.as_mut_ptr().cast(), to.len()) }
    }) {
        Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        list => list?,
    };
    let mut all = Vec::new();
    for name in list.split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let text = CString::new(name).map_err(|_| Error::bug("a name with a NUL in it"))?;
        let value = sized("fgetxattr", |to| {
            // SAFETY: `text` ends with a NUL; the kernel writes at most as many bytes as `to` has.
            unsafe { libc::fgetxattr(raw, text.as_ptr(), to.as_mut_ptr().cast(), to.len()) }
        });
        match value {
            Ok(value) => all.push((name.to_vec(), value)),
            // Taken away meanwhile, or not for us.
            Err(e) if matches!(e.errno(), Some(libc::ENODATA | libc::EPERM)) => {}
            Err(e) => return Err(e.on(String::from_utf8_lossy(name).into_owned())),
        }
    }
    Ok(all)
}

/// Calls with more and more room until the answer fits.
fn sized(name: &'static str, mut call: impl FnMut(&mut [u8]) -> isize) -> Result<Vec<u8>> {
    // The longest value, or list of names, there is (XATTR_SIZE_MAX).
    for room in [4096, 65536] {
        let mut buffer = vec![0u8; room];
        match usize::try_from(call(&mut buffer)) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Err(_) => {
                let e = Error::last_os(name);
                if e.errno() != Some(libc::ERANGE) {
                    return Err(e);
                }
            }
        }
    }
    Err(Error::syscall(name, libc::ERANGE))
}

/// Sets an extended attribute (fsetxattr(2)).
pub fn set_attribute(fd: impl AsFd, name: &[u8], value: &[u8]) -> Result<()> {
    let shown = String::from_utf8_lossy(name).into_owned();
    let text = CString::new(name)
        .map_err(|_| Error::corrupt("the name of an extended attribute has a NUL in it"))?;
    // SAFETY: `text` ends with a NUL and `value` has as many bytes as we say.
    let done = unsafe {
        libc::fsetxattr(
            fd.as_fd().as_raw_fd(),
            text.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    if done != 0 {
        return Err(Error::last_os("fsetxattr")).on(shown);
    }
    Ok(())
}

/// Sets the times of the last access and the last change of the contents, in
/// nanoseconds since 1970 (utimensat(2)). Not of an `O_PATH` descriptor.
pub fn set_times(fd: impl AsFd, access_ns: i64, change_ns: i64) -> Result<()> {
    let time = |ns: i64| libc::timespec {
        tv_sec: ns.div_euclid(1_000_000_000),
        tv_nsec: ns.rem_euclid(1_000_000_000),
    };
    let times = [time(access_ns), time(change_ns)];
    // SAFETY: futimens reads two timespecs, which `times` has.
    if unsafe { libc::futimens(fd.as_fd().as_raw_fd(), times.as_ptr()) } != 0 {
        return Err(Error::last_os("futimens"));
    }
    Ok(())
}
