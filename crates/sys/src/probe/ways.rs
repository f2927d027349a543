//! How each feature is tried. Each returns what there is to say of a feature
//! that works, or why it does not.
#![allow(unsafe_code)]

use super::child::{Child, paused_child, stopped_child, try_in_child};
use crate::fd::{self, ioctl};
use crate::ids::{Pid, Tid};
use crate::kcmp::{EpollSlot, KcmpType};
use crate::mem::Mem;
use crate::pagemap;
use crate::proc::ProcDir;
use crate::ptrace::{self, Options, nt};
use freezeframe_error::Error;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

type Answer = Result<String, String>;

/// A success with nothing more to say.
fn fine() -> Answer {
    Ok(String::new())
}

/// An error with its cause, in one line.
fn said(error: Error) -> String {
    use std::error::Error as _;
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn errno(call: &str, errno: Errno) -> String {
    format!("{call}: {}", errno.desc())
}

/// The answer of a call that gives -1 on failure.
fn answer(call: &str, result: libc::c_long) -> Answer {
    Errno::result(result).map_err(|e| errno(call, e))?;
    fine()
}

/// The same for a call that made a descriptor.
fn descriptor(call: &str, result: libc::c_long) -> Result<OwnedFd, String> {
    let fd = Errno::result(result).map_err(|e| errno(call, e))?;
    // SAFETY: our callers pass what a call that makes descriptors returned.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// For work in children: 0 or the errno, of a result that is -1 on failure.
fn code(result: libc::c_long) -> i32 {
    if result < 0 { Errno::last_raw() } else { 0 }
}

/// Work that does nothing.
fn nothing() -> i32 {
    0
}

/// A child of ours that sleeps, stopped by tracing it.
fn tracee(options: Options) -> Result<(Child, Tid), String> {
    let child = stopped_child(nothing, options)?;
    let tid = child.pid().leader();
    Ok((child, tid))
}

// Tracing.

pub(super) fn ptrace_seize() -> Answer {
    let (_child, tid) = tracee(Options::EXITKILL)?;
    ptrace::getregs(tid).map_err(said)?;
    fine()
}

pub(super) fn ptrace_peeksiginfo() -> Answer {
    let (_child, tid) = tracee(Options::EXITKILL)?;
    ptrace::peeksiginfo(tid, 0, true).map_err(said)?;
    fine()
}

pub(super) fn ptrace_xstate() -> Answer {
    let (_child, tid) = tracee(Options::EXITKILL)?;
    let state = ptrace::getregset(tid, nt::X86_XSTATE).map_err(said)?;
    Ok(format!("{} bytes", state.len()))
}

pub(super) fn ptrace_get_syscall_info() -> Answer {
    let (_child, tid) = tracee(Options::EXITKILL)?;
    ptrace::get_syscall_info(tid).map_err(said)?;
    fine()
}

pub(super) fn ptrace_get_rseq_conf() -> Answer {
    let (_child, tid) = tracee(Options::EXITKILL)?;
    let conf = ptrace::get_rseq_configuration(tid).map_err(said)?;
    Ok(format!("{conf:?}"))
}

pub(super) fn syscall_user_dispatch() -> Answer {
    let (_child, tid) = tracee(Options::EXITKILL)?;
    ptrace::get_syscall_user_dispatch(tid).map_err(said)?;
    fine()
}

pub(super) fn seccomp_suspend() -> Answer {
    tracee(Options::EXITKILL | Options::SUSPEND_SECCOMP)?;
    fine()
}

pub(super) fn seccomp_filters() -> Answer {
    /// Installs the filter that allows everything.
    fn filter() -> i32 {
        let mut allow = libc::sock_filter {
            code: (libc::BPF_RET | libc::BPF_K) as u16,
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ALLOW,
        };
        let program = libc::sock_fprog {
            len: 1,
            filter: &raw mut allow,
        };
        // SAFETY: the program holds one instruction, which outlives the call.
        unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            let mode = libc::SECCOMP_MODE_FILTER;
            code(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program, 0, 0).into())
        }
    }
    let child = stopped_child(filter, Options::EXITKILL)?;
    match ptrace::seccomp_get_filter(child.pid().leader(), 0).map_err(said)? {
        Some(program) if program.len() == 1 => fine(),
        other => Err(format!("a filter of 1 instruction reads as {other:?}")),
    }
}

pub(super) fn breakpoints() -> Answer {
    let (_child, tid) = tracee(Options::EXITKILL)?;
    let debugreg = std::mem::offset_of!(libc::user, u_debugreg);
    // SAFETY: writes the first debug register of our own stopped child.
    let done = unsafe { libc::ptrace(libc::PTRACE_POKEUSER, tid.0, debugreg, 0x1000) };
    answer("ptrace(POKEUSER)", done)
}

// Memory.

/// A word that is the same in our children, and never changes.
static WORD: u64 = 0x6672_6565_7a65_2121;

pub(super) fn proc_pid_mem() -> Answer {
    let child = paused_child(nothing)?;
    let mem = Mem::open(child.pid(), true).map_err(said)?;
    let at = &raw const WORD as u64;
    // The page is not writable to the child itself.
    mem.write_all_at(at, &(!WORD).to_ne_bytes()).map_err(said)?;
    match mem.read_u64(at).map_err(said)? {
        word if word == !WORD => fine(),
        _ => Err("what was written did not read back".into()),
    }
}

pub(super) fn process_vm_readv() -> Answer {
    let child = paused_child(nothing)?;
    let mut word = [0; 8];
    crate::mem::vm_read(child.pid(), &raw const WORD as u64, &mut word).map_err(said)?;
    if word == WORD.to_ne_bytes() {
        fine()
    } else {
        Err("read something else".into())
    }
}

pub(super) fn bpf_task_iter() -> Answer {
    let iter = crate::task_fields::TaskIter::new().map_err(said)?;
    let own = iter.read(Pid::this()).map_err(said)?;
    match own.contains_key(&Tid::this()) {
        true => fine(),
        false => Err("it does not show us".into()),
    }
}

pub(super) fn pagemap_scan() -> Answer {
    if pagemap::has_pagemap_scan() {
        fine()
    } else {
        Err("ioctl(PAGEMAP_SCAN) is not known".into())
    }
}

/// A private page of our own that has been written to.
fn written_page() -> Result<crate::mmap::Buffer, String> {
    let mut page = crate::mmap::Buffer::new(crate::mmap::PAGE_SIZE).map_err(said)?;
    page[0] = 1;
    Ok(page)
}

pub(super) fn pagemap_scan_guard_pages() -> Answer {
    const MADV_GUARD_INSTALL: i32 = 102;
    let page = written_page()?;
    let start = page.as_ptr() as u64;
    // SAFETY: the page is ours alone, and is not touched again before it is unmapped.
    let done = unsafe { libc::madvise(start as *mut libc::c_void, page.len(), MADV_GUARD_INSTALL) };
    answer("madvise(MADV_GUARD_INSTALL)", done.into())?;
    let map = pagemap::Pagemap::open(Pid::this()).map_err(said)?;
    let mut runs = Vec::new();
    let end = start + page.len() as u64;
    map.scan(start, end, pagemap::Categories::GUARD, &mut runs)
        .map_err(said)?;
    if runs.is_empty() {
        Err("a guard page was not reported".into())
    } else {
        fine()
    }
}

pub(super) fn mem_dirty_track() -> Answer {
    let page = written_page()?;
    let map = pagemap::Pagemap::open(Pid::this()).map_err(said)?;
    let entries = map.entries(page.as_ptr() as u64, 1).map_err(said)?;
    match entries.first() {
        Some(entry) if entry >> 55 & 1 == 1 => fine(),
        _ => Err("a written page is not soft-dirty (CONFIG_MEM_SOFT_DIRTY)".into()),
    }
}

/// A userfaultfd with these features, or why there is none.
fn userfaultfd(features: u64) -> Answer {
    const UFFDIO_API: u64 = 0xc018_aa3f;
    const UFFD_API: u64 = 0xaa;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes an integer, makes a descriptor.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = descriptor("userfaultfd", made)?;
    let mut api = [UFFD_API, features, 0u64];
    // SAFETY: UFFDIO_API reads and writes the three words of `api`.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
    answer("ioctl(UFFDIO_API)", done.into())?;
    Ok(format!("features {:#x}", api[1]))
}

pub(super) fn uffd() -> Answer {
    userfaultfd(0)
}

pub(super) fn uffd_noncoop() -> Answer {
    // UFFD_FEATURE_EVENT_FORK, _REMAP, _REMOVE, _UNMAP.
    userfaultfd(1 << 1 | 1 << 2 | 1 << 3 | 1 << 6)
}

pub(super) fn uffd_wp_async() -> Answer {
    userfaultfd(1 << 15)
}

pub(super) fn set_mm_map() -> Answer {
    const PR_SET_MM_MAP_SIZE: i32 = 15;
    let mut size = 0u32;
    let at = &raw mut size;
    // SAFETY: PR_SET_MM_MAP_SIZE writes one 32-bit number.
    let done = unsafe { libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, at, 0, 0) };
    answer("prctl(PR_SET_MM_MAP_SIZE)", done.into())
}

pub(super) fn can_map_vdso() -> Answer {
    const ARCH_MAP_VDSO_64: i32 = 0x2003;
    /// Asks for a second vDSO, which the kernel refuses in its own way.
    fn map_again() -> i32 {
        // SAFETY: asks where a mapping would go; refused while one is there.
        let done = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, 0) };
        match code(done) {
            // "There is one already" is the answer of a kernel that can.
            libc::EEXIST => 0,
            other => other,
        }
    }
    try_in_child(map_again)
}

pub(super) fn memfd() -> Answer {
    fd::memfd_create(c"probe", libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING).map_err(said)?;
    fine()
}

pub(super) fn memfd_hugetlb() -> Answer {
    fd::memfd_create(c"probe", libc::MFD_CLOEXEC | libc::MFD_HUGETLB).map_err(said)?;
    fine()
}

pub(super) fn memfd_secret() -> Answer {
    // SAFETY: takes an integer, makes a descriptor.
    let made = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    descriptor("memfd_secret", made)?;
    fine()
}

pub(super) fn anon_vma_name() -> Answer {
    const PR_SET_VMA: i32 = 0x5356_4d41;
    let page = written_page()?;
    let name = c"probe".as_ptr();
    // SAFETY: the kernel reads the name, and names a page of our own.
    let done = unsafe { libc::prctl(PR_SET_VMA, 0, page.as_ptr(), page.len(), name) };
    answer("prctl(PR_SET_VMA_ANON_NAME)", done.into())
}

// Processes.

pub(super) fn proc_children() -> Answer {
    let child = paused_child(nothing)?;
    let us = ProcDir::open(Pid::this()).map_err(said)?;
    us.read(&format!("task/{}/children", Tid::this()))
        .map_err(said)?;
    let children = us.children().map_err(said)?;
    if children.contains(&child.pid()) {
        fine()
    } else {
        Err("a child was not in the list".into())
    }
}

pub(super) fn pidfd_open() -> Answer {
    crate::pidfd::pidfd_open(Pid::this()).map_err(said)?;
    fine()
}

pub(super) fn pidfd_getfd() -> Answer {
    let child = paused_child(nothing)?;
    let null = File::open("/dev/null").map_err(|e| e.to_string())?;
    let pidfd = crate::pidfd::pidfd_open(Pid::this()).map_err(said)?;
    crate::pidfd::pidfd_getfd(&pidfd, null.as_raw_fd()).map_err(said)?;
    let pidfd = crate::pidfd::pidfd_open(child.pid()).map_err(said)?;
    match crate::pidfd::pidfd_getfd(&pidfd, i32::MAX) {
        Err(e) if e.errno() == Some(libc::EBADF) => fine(),
        Err(e) => Err(said(e)),
        Ok(_) => Err("gave a descriptor that is not open".into()),
    }
}

pub(super) fn kcmp() -> Answer {
    let us = Pid::this();
    crate::kcmp::kcmp(us, us, KcmpType::Vm, 0, 0).map_err(said)?;
    fine()
}

pub(super) fn kcmp_epoll() -> Answer {
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    let failed = |e| errno("epoll", e);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
    let (reader, _writer) = fd::pipe_pair(nix::fcntl::OFlag::empty()).map_err(said)?;
    epoll
        .add(&reader, EpollEvent::new(EpollFlags::EPOLLIN, 0))
        .map_err(failed)?;
    let slot = EpollSlot {
        efd: epoll.0.as_raw_fd() as u32,
        tfd: reader.as_raw_fd() as u32,
        toff: 0,
    };
    let us = Pid::this();
    crate::kcmp::kcmp_epoll(us, reader.as_raw_fd(), us, slot).map_err(said)?;
    fine()
}

pub(super) fn clone3_set_tid() -> Answer {
    /// The first 80 bytes of `struct clone_args`: ten words.
    const SET_TID: usize = 8;
    /// Makes a child, and makes one of the same PID when that is gone.
    fn twice() -> i32 {
        fn child(pid: libc::pid_t) -> Result<libc::pid_t, i32> {
            let mut args = [0u64; 10];
            if pid != 0 {
                args[SET_TID] = &raw const pid as u64;
                args[SET_TID + 1] = 1;
            }
            // SAFETY: without flags this copies the process; the child leaves
            // at once. The kernel reads the ten words and the PID they point to.
            unsafe {
                let made = libc::syscall(libc::SYS_clone3, args.as_ptr(), 80) as libc::pid_t;
                match made {
                    -1 => return Err(Errno::last_raw()),
                    0 => libc::_exit(0),
                    _ => {}
                }
                libc::waitpid(made, std::ptr::null_mut(), libc::__WALL);
                Ok(made)
            }
        }
        match child(0).map(|pid| (pid, child(pid))) {
            Ok((pid, Ok(again))) if again == pid => 0,
            // Somebody took the PID meanwhile: the kernel looked for it.
            Ok((_, Err(libc::EEXIST))) => 0,
            Ok((_, Ok(_))) => libc::EINVAL,
            Ok((_, Err(errno))) | Err(errno) => errno,
        }
    }
    try_in_child(twice)
}

pub(super) fn rseq() -> Answer {
    // SAFETY: with flags that do not exist the call fails before it reads anything.
    let done = unsafe { libc::syscall(libc::SYS_rseq, 0, 0, !0u32, 0) };
    match code(done) {
        libc::ENOSYS => Err("rseq: not known".into()),
        _ => fine(),
    }
}

pub(super) fn membarrier_get_registrations() -> Answer {
    const MEMBARRIER_CMD_GET_REGISTRATIONS: i32 = 1 << 9;
    // SAFETY: takes integers, touches no memory of ours.
    let done =
        unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0) };
    answer("membarrier(GET_REGISTRATIONS)", done)
}

pub(super) fn proc_timers() -> Answer {
    ProcDir::open(Pid::this())
        .and_then(|us| us.timers())
        .map_err(said)?;
    fine()
}

pub(super) fn timer_create_restore_ids() -> Answer {
    fn timer_with_id() -> i32 {
        const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
        const WANTED: i32 = 7007;
        let mut id = WANTED;
        // SAFETY: timer_create reads a null event and reads and writes the id.
        unsafe {
            if libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0) < 0 {
                return Errno::last_raw();
            }
            let clock = libc::CLOCK_MONOTONIC;
            let none = std::ptr::null::<libc::sigevent>();
            match code(libc::syscall(
                libc::SYS_timer_create,
                clock,
                none,
                &raw mut id,
            )) {
                0 if id != WANTED => libc::EINVAL,
                other => other,
            }
        }
    }
    try_in_child(timer_with_id)
}

pub(super) fn loginuid() -> Answer {
    fn set() -> i32 {
        // SAFETY: opens a constant path and writes constant bytes.
        unsafe {
            let fd = libc::open(c"/proc/thread-self/loginuid".as_ptr(), libc::O_WRONLY);
            if fd < 0 {
                return Errno::last_raw();
            }
            code(libc::write(fd, c"0".as_ptr().cast(), 1) as libc::c_long)
        }
    }
    try_in_child(set)
}

pub(super) fn apparmor_stacking() -> Answer {
    let path = "/sys/kernel/security/apparmor/features/domain/stack";
    match std::fs::read(path) {
        Ok(text) if text.starts_with(b"yes") => fine(),
        Ok(_) => Err("AppArmor says no".into()),
        Err(_) => Err("no AppArmor here".into()),
    }
}

// Namespaces.

macro_rules! unshares {
    ($($name:ident $flag:expr;)*) => {$(
        pub(super) fn $name() -> Answer {
            fn unshare() -> i32 {
                // SAFETY: takes an integer, in a child of our own.
                code(unsafe { libc::unshare($flag) }.into())
            }
            try_in_child(unshare)
        }
    )*};
}

unshares! {
    userns libc::CLONE_NEWUSER;
    pidns libc::CLONE_NEWPID;
    mntns libc::CLONE_NEWNS;
    netns libc::CLONE_NEWNET;
    ipcns libc::CLONE_NEWIPC;
    utsns libc::CLONE_NEWUTS;
    cgroupns libc::CLONE_NEWCGROUP;
    timens 0x80;
}

// Files.

pub(super) fn pipe_tee() -> Answer {
    let (reader, writer) = fd::pipe_pair(nix::fcntl::OFlag::empty()).map_err(said)?;
    nix::unistd::write(&writer, b"x").map_err(|e| errno("write", e))?;
    fd::peek_pipe(&reader).map_err(said)?;
    fine()
}

pub(super) fn timerfd_ticks() -> Answer {
    use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC);
    let timer = timer.map_err(|e| errno("timerfd_create", e))?;
    ioctl::set_timerfd_ticks(&timer, 3).map_err(said)?;
    fine()
}

pub(super) fn inotify_next_watch() -> Answer {
    use nix::sys::inotify::{InitFlags, Inotify};
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).map_err(|e| errno("inotify_init1", e))?;
    ioctl::set_inotify_next_watch(&inotify, 9).map_err(said)?;
    fine()
}

/// What fdinfo says of a descriptor of ours.
fn own_fdinfo(fd: impl AsFd) -> Result<crate::proc::FdInfo, String> {
    ProcDir::open(Pid::this())
        .and_then(|us| us.fdinfo(fd.as_fd().as_raw_fd()))
        .map_err(said)
}

pub(super) fn fdinfo_lock() -> Answer {
    let file = File::from(fd::memfd_create(c"probe", libc::MFD_CLOEXEC).map_err(said)?);
    // SAFETY: takes two integers; the lock goes with the file.
    let done = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    answer("flock", done.into())?;
    match own_fdinfo(&file)?.get("lock") {
        Some(_) => fine(),
        None => Err("a lock is not in fdinfo".into()),
    }
}

pub(super) fn mnt_id() -> Answer {
    let file = File::open("/proc/self/exe").map_err(|e| e.to_string())?;
    let id = own_fdinfo(&file)?.mnt_id;
    if id > 0 {
        fine()
    } else {
        Err("no mount id in fdinfo".into())
    }
}

pub(super) fn map_files() -> Answer {
    let us = ProcDir::open(Pid::this()).map_err(said)?;
    let maps = us.maps().map_err(said)?;
    let map = maps.iter().find(|m| m.path.starts_with(b"/"));
    let map = map.ok_or("no file is mapped here")?;
    us.open(
        &format!("map_files/{:x}-{:x}", map.start, map.end),
        nix::fcntl::OFlag::O_RDONLY,
    )
    .map_err(said)?;
    fine()
}

pub(super) fn openat2() -> Answer {
    const RESOLVE_NO_SYMLINKS: u64 = 4;
    let how = [
        libc::O_PATH as u64 | libc::O_CLOEXEC as u64,
        0,
        RESOLVE_NO_SYMLINKS,
    ];
    let path = c"/".as_ptr();
    // SAFETY: the kernel reads the path and the 24 bytes of `how`.
    let made = unsafe { libc::syscall(libc::SYS_openat2, libc::AT_FDCWD, path, how.as_ptr(), 24) };
    descriptor("openat2", made)?;
    fine()
}

/// A mount namespace of the child's own, with an empty tmpfs on /tmp: 0, or
/// the errno of what failed. For work in children.
fn private_tmp() -> i32 {
    let none = c"none".as_ptr();
    let (root, tmp, tmpfs) = (c"/".as_ptr(), c"/tmp".as_ptr(), c"tmpfs".as_ptr());
    let private = libc::MS_REC | libc::MS_PRIVATE;
    let null = std::ptr::null::<libc::c_char>;
    // SAFETY: all strings are constants; only the child's namespace changes.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) < 0
            || libc::mount(none, root, null(), private, null().cast()) < 0
            || libc::mount(none, tmp, tmpfs, 0, null().cast()) < 0
        {
            return Errno::last_raw();
        }
    }
    0
}

pub(super) fn overlayfs_maps() -> Answer {
    /// Maps a file of the lower layer of an overlay, and keeps it mapped.
    fn map_below() -> i32 {
        match private_tmp() {
            0 => {}
            errno => return errno,
        }
        let options = c"lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w"
            .as_ptr()
            .cast();
        let (merged, overlay) = (c"/tmp/m".as_ptr(), c"overlay".as_ptr());
        // SAFETY: all strings are constants; the mapping is a new one of the child's.
        unsafe {
            for dir in [c"/tmp/l", c"/tmp/u", c"/tmp/w", c"/tmp/m"] {
                if libc::mkdir(dir.as_ptr(), 0o700) < 0 {
                    return Errno::last_raw();
                }
            }
            let fd = libc::open(c"/tmp/l/f".as_ptr(), libc::O_CREAT | libc::O_RDWR, 0o600);
            if fd < 0
                || libc::ftruncate(fd, 4096) < 0
                || libc::mount(overlay, merged, overlay, 0, options) < 0
            {
                return Errno::last_raw();
            }
            let fd = libc::open(c"/tmp/m/f".as_ptr(), libc::O_RDONLY);
            if fd < 0 {
                return Errno::last_raw();
            }
            let (read, private) = (libc::PROT_READ, libc::MAP_PRIVATE);
            let map = libc::mmap(std::ptr::null_mut(), 4096, read, private, fd, 0);
            if map == libc::MAP_FAILED {
                Errno::last_raw()
            } else {
                0
            }
        }
    }
    let child = paused_child(map_below)?;
    let proc = ProcDir::open(child.pid()).map_err(said)?;
    let maps = proc.maps().map_err(said)?;
    let map = maps.iter().find(|m| m.path == b"/tmp/m/f");
    let map = map.ok_or("the mapped file has another path")?;
    let file = fd::stat_at(&*proc, c"root/tmp/m/f", true).map_err(said)?;
    let dev = libc::makedev(map.dev_major, map.dev_minor);
    if (dev, map.inode) == (file.dev, file.ino) {
        return fine();
    }
    Err(format!(
        "mapped {dev:#x}:{}, opened {:#x}:{}",
        map.inode, file.dev, file.ino
    ))
}

pub(super) fn move_mount_set_group() -> Answer {
    fn join_group() -> i32 {
        const MOVE_MOUNT_SET_GROUP: u32 = 0x100;
        match private_tmp() {
            0 => {}
            errno => return errno,
        }
        let (a, b) = (c"/tmp/a".as_ptr(), c"/tmp/b".as_ptr());
        let (none, tmpfs) = (c"none".as_ptr(), c"tmpfs".as_ptr());
        let null = std::ptr::null::<libc::c_char>;
        // SAFETY: all strings are constants; only the child's namespace changes.
        unsafe {
            if libc::mkdir(a, 0o700) < 0
                || libc::mkdir(b, 0o700) < 0
                || libc::mount(none, a, tmpfs, 0, null().cast()) < 0
                || libc::mount(a, b, null(), libc::MS_BIND, null().cast()) < 0
                || libc::mount(none, a, null(), libc::MS_SHARED, null().cast()) < 0
            {
                return Errno::last_raw();
            }
            let here = libc::AT_FDCWD;
            let flags = MOVE_MOUNT_SET_GROUP;
            code(libc::syscall(libc::SYS_move_mount, here, a, here, b, flags))
        }
    }
    try_in_child(join_group)
}

// Sockets.

fn socket(family: AddressFamily, kind: SockType) -> Result<OwnedFd, String> {
    nix::sys::socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|e| errno("socket", e))
}

pub(super) fn so_peek_off() -> Answer {
    let unix = socket(AddressFamily::Unix, SockType::Stream)?;
    fd::setsockopt_i32(&unix, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0).map_err(said)?;
    fine()
}

pub(super) fn sk_unix_file() -> Answer {
    let unix = socket(AddressFamily::Unix, SockType::Stream)?;
    match ioctl::unix_socket_file(&unix) {
        // It is bound to no file, which the kernel has looked for.
        Err(e) if e.errno() == Some(libc::ENOENT) => fine(),
        Err(e) => Err(said(e)),
        Ok(_) => fine(),
    }
}

pub(super) fn sk_ns() -> Answer {
    let unix = socket(AddressFamily::Unix, SockType::Stream)?;
    ioctl::socket_netns(&unix).map_err(said)?;
    fine()
}

pub(super) fn tcp_repair() -> Answer {
    let tcp = socket(AddressFamily::Inet, SockType::Stream)?;
    fd::setsockopt_i32(&tcp, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1).map_err(said)?;
    fine()
}

pub(super) fn ipv6_freebind() -> Answer {
    const IPV6_FREEBIND: i32 = 78;
    let udp = socket(AddressFamily::Inet6, SockType::Datagram)?;
    fd::setsockopt_i32(&udp, libc::IPPROTO_IPV6, IPV6_FREEBIND, 1).map_err(said)?;
    fine()
}

pub(super) fn tun() -> Answer {
    const TUNGETFEATURES: u64 = 0x8004_54cf;
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|e| format!("/dev/net/tun: {e}"))?;
    let mut features = 0u32;
    // SAFETY: TUNGETFEATURES writes one 32-bit number.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), TUNGETFEATURES, &raw mut features) };
    answer("ioctl(TUNGETFEATURES)", done.into())
}

/// Asks a netlink family something, and reads whether it answers with an error.
fn netlink(family: i32, kind: u16, flags: u16, body: &[u8]) -> Answer {
    const NLM_F_REQUEST: u16 = 1;
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    let flags = flags | NLM_F_REQUEST;
    let (domain, kind_of) = (libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC);
    // SAFETY: takes integers, makes a descriptor.
    let made = unsafe { libc::socket(domain, kind_of, family) };
    let socket = descriptor("socket(AF_NETLINK)", made.into())?;
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend((16 + body.len() as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]); // sequence number and port
    message.extend(body);
    // SAFETY: the kernel reads the bytes of `message`; an unconnected netlink
    // socket sends to the kernel.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            message.as_ptr().cast(),
            message.len(),
            0,
        )
    };
    answer("send", sent as libc::c_long)?;
    let mut reply = vec![0u8; 32 << 10];
    // The kernel answers before send returns.
    let dont_wait = libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most as many bytes as `reply` has.
    let got = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            reply.as_mut_ptr().cast(),
            reply.len(),
            dont_wait,
        )
    };
    answer("recv", got as libc::c_long)?;
    let word = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&reply[at..at + 4]);
        i32::from_ne_bytes(bytes)
    };
    // The end of a list holds an error too, where the list could not be made.
    let kind = u16::from_ne_bytes([reply[4], reply[5]]);
    match matches!(kind, NLMSG_ERROR | NLMSG_DONE) && word(16) < 0 {
        true => Err(Errno::from_raw(-word(16)).desc().into()),
        false => fine(),
    }
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_DUMP: u16 = 0x300;

/// Lists the sockets of an internet protocol.
fn inet_diag(family: i32, protocol: i32) -> Answer {
    let mut request = [0u8; 56]; // inet_diag_req_v2: no state asked for
    request[0] = family as u8;
    request[1] = protocol as u8;
    netlink(
        libc::NETLINK_SOCK_DIAG,
        SOCK_DIAG_BY_FAMILY,
        NLM_F_DUMP,
        &request,
    )
}

pub(super) fn sock_diag() -> Answer {
    let mut unix = [0u8; 24]; // unix_diag_req: no state asked for
    unix[0] = libc::AF_UNIX as u8;
    netlink(
        libc::NETLINK_SOCK_DIAG,
        SOCK_DIAG_BY_FAMILY,
        NLM_F_DUMP,
        &unix,
    )
    .map_err(|why| format!("unix: {why}"))?;
    let protocols = [("tcp", libc::IPPROTO_TCP), ("udp", libc::IPPROTO_UDP)];
    for (name, protocol) in protocols {
        inet_diag(libc::AF_INET, protocol).map_err(|why| format!("{name}: {why}"))?;
    }
    fine()
}

pub(super) fn net_diag_raw() -> Answer {
    inet_diag(libc::AF_INET, libc::IPPROTO_RAW)
}

pub(super) fn nftables() -> Answer {
    const NFT_MSG_GETGEN: u16 = 10 << 8 | 16;
    netlink(libc::NETLINK_NETFILTER, NFT_MSG_GETGEN, 0, &[0; 4])
}
