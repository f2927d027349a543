use super::*;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A child that blocks reading from a pipe, killed and reaped at the end.
struct Sleeper(Child);

impl Sleeper {
    fn spawn() -> Sleeper {
        let child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Sleeper(child)
    }
    fn pid(&self) -> Pid {
        Pid(self.0.id() as i32)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until<T>(mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(t) = found() {
            return t;
        }
        assert!(Instant::now() < deadline, "condition not met in 30 s");
        std::thread::yield_now();
    }
}

fn this() -> ProcDir {
    ProcDir::open(Pid::this()).unwrap()
}

#[test]
fn our_own_stat_and_status() {
    let stat = this().stat().unwrap();
    assert_eq!(stat.pid, std::process::id() as i32);
    assert_eq!(stat.ppid, nix::unistd::getppid().as_raw());
    assert_eq!(stat.pgrp, nix::unistd::getpgrp().as_raw());
    assert_eq!(stat.session, nix::unistd::getsid(None).unwrap().as_raw());
    assert!(!stat.is_kernel_thread() && !stat.is_zombie());
    let code = our_own_stat_and_status as *const () as u64;
    assert!((stat.start_code..stat.end_code).contains(&code), "{stat:?}");

    let status = this().status().unwrap();
    assert_eq!(status.tgid, stat.pid);
    assert_eq!(status.ns_pid[0], stat.pid);
    assert_eq!(status.uids[1], nix::unistd::geteuid().as_raw());
    assert_eq!(status.gids[0], nix::unistd::getgid().as_raw());
    let groups: Vec<u32> = nix::unistd::getgroups()
        .unwrap()
        .iter()
        .map(|g| g.as_raw())
        .collect();
    assert_eq!(status.groups, groups);
    assert_eq!(status.seccomp, SeccompMode::Disabled);
    // Rust ignores SIGPIPE.
    assert!(status.sig_ign >> (libc::SIGPIPE - 1) & 1 == 1);
    assert_eq!(status.name, this().comm().unwrap());
}

#[test]
fn a_mapping_we_made_is_in_maps() {
    let file = tempfile_with(&[7; 3 * 4096], "map me\n");
    let map = crate::mmap::MappedFile::of(&file.0).unwrap();
    let at = map.as_ptr() as u64;
    let all = this().maps().unwrap();
    let found = all.iter().find(|m| m.start == at).unwrap();
    assert_eq!(found.len(), 3 * 4096);
    assert!(found.read && !found.write && !found.exec);
    assert_eq!(found.offset, 0);
    assert_eq!(found.path, file.1.as_os_str().as_bytes());
    let stat = nix::sys::stat::fstat(&file.0).unwrap();
    assert_eq!(found.inode, stat.st_ino);
    assert_eq!(
        (u64::from(found.dev_major), u64::from(found.dev_minor)),
        (
            nix::sys::stat::major(stat.st_dev),
            nix::sys::stat::minor(stat.st_dev)
        )
    );
    assert!(found.deleted().is_none());
    std::fs::remove_file(&file.1).unwrap();
    let all = this().maps().unwrap();
    let found = all.iter().find(|m| m.contains(at)).unwrap();
    assert_eq!(found.deleted().unwrap(), file.1.as_os_str().as_bytes());

    let smaps = this().smaps().unwrap();
    let found = smaps.iter().find(|s| s.map.start == at).unwrap();
    assert!(found.vm_flags.contains(VmFlags::READ | VmFlags::MAY_READ));
    assert!(!found.vm_flags.contains(VmFlags::WRITE));
    assert_eq!(found.kernel_page_size, 4096);
    assert!(
        all.iter()
            .any(|m| m.path == b"[vdso]" && m.is_kernel_made())
    );
}

/// A file in the temporary directory with an odd name.
fn tempfile_with(content: &[u8], name: &str) -> (std::fs::File, std::path::PathBuf) {
    let path = std::env::temp_dir().join(format!("ff-sys-{}-{name}", std::process::id()));
    std::fs::write(&path, content).unwrap();
    (std::fs::File::open(&path).unwrap(), path)
}

#[test]
fn descriptors_and_their_info() {
    let file = tempfile_with(b"0123456789", "fd");
    nix::unistd::lseek(&file.0, 4, nix::unistd::Whence::SeekSet).unwrap();
    let fd = file.0.as_raw_fd();
    assert!(this().fds().unwrap().contains(&fd));
    assert_eq!(this().fd_link(fd).unwrap(), file.1.as_os_str().as_bytes());
    let info = this().fdinfo(fd).unwrap();
    assert_eq!(info.pos, 4);
    assert!(info.close_on_exec());
    assert_eq!(info.flags & libc::O_ACCMODE as u32, libc::O_RDONLY as u32);
    let stat = nix::sys::stat::fstat(&file.0).unwrap();
    assert_eq!(info.ino, stat.st_ino);
    let mounts = this().mountinfo().unwrap();
    assert!(
        mounts.iter().any(|m| m.id == info.mnt_id),
        "{}",
        info.mnt_id
    );
    std::fs::remove_file(&file.1).unwrap();
    let e = this().fdinfo(1_000_000).unwrap_err();
    assert_eq!(e.errno(), Some(libc::ENOENT));
    assert_ne!(e.kind(), Kind::TargetGone);
}

#[test]
fn children_and_their_end() {
    let child = Sleeper::spawn();
    let dir = ProcDir::open(child.pid()).unwrap();
    assert!(this().children().unwrap().contains(&child.pid()));
    assert!(all_pids().unwrap().contains(&child.pid()));
    assert_eq!(dir.stat().unwrap().ppid, std::process::id() as i32);
    assert_eq!(dir.tasks().unwrap(), [child.pid().leader()]);
    // cat reads from descriptor 0.
    let (nr, args) = until(|| match dir.syscall().unwrap() {
        SyscallState::Blocked { nr, args, pc, sp } => {
            assert!(pc != 0 && sp != 0);
            (nr == libc::SYS_read).then_some((nr, args))
        }
        _ => None,
    });
    assert_eq!((nr, args[0]), (libc::SYS_read, 0));
    assert!(dir.cmdline().unwrap().starts_with(b"cat\0"));
    assert!(dir.link("exe").unwrap().ends_with(b"cat") || dir.link("exe").is_ok());
    assert!(
        dir.environ()
            .unwrap()
            .split(|&b| b == 0)
            .any(|v| v.starts_with(b"PATH="))
    );
    assert_eq!(dir.auxv().unwrap().len() % 16, 0);
    assert!(dir.sched_exec_start_ns().unwrap().is_some_and(|ns| ns > 0));

    // A zombie can still be asked; once reaped it is gone, whoever has its PID.
    let mut child = child;
    child.0.kill().unwrap();
    until(|| dir.stat().unwrap().is_zombie().then_some(()));
    assert_eq!(dir.stat().unwrap().exit_code, libc::SIGKILL);
    assert!(dir.maps().unwrap().is_empty());
    assert_eq!(dir.status().unwrap().umask, None);
    assert!(dir.check_alive().is_ok());
    child.0.wait().unwrap();
    for result in [
        dir.stat().map(drop),
        dir.maps().map(drop),
        dir.tasks().map(drop),
        dir.children().map(drop),
        dir.fds().map(drop),
        dir.link("exe").map(drop),
        dir.check_alive(),
        ProcDir::open(child.pid()).map(drop),
    ] {
        let e = result.unwrap_err();
        assert_eq!(e.kind(), Kind::TargetGone, "{e:?}");
        assert_eq!(e.task(), Some(child.pid().0));
    }
}

#[test]
fn threads_have_their_own_files() {
    let (tx, rx) = std::sync::mpsc::channel();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::Builder::new()
        .name(") a\n(b \\".into())
        .spawn(move || {
            tx.send(Tid::this()).unwrap();
            let _ = stopped.recv();
        })
        .unwrap();
    let tid = rx.recv().unwrap();
    assert!(this().tasks().unwrap().contains(&tid));
    let task = this().task(tid).unwrap();
    assert_eq!((task.pid(), task.tid()), (Pid::this(), tid));
    assert_eq!(task.stat().unwrap().comm, b") a\n(b \\");
    assert_eq!(task.status().unwrap().name, b") a\n(b \\");
    assert_eq!(task.comm().unwrap(), b") a\n(b \\");
    assert!(task.sched_exec_start_ns().unwrap().is_some());
    assert_eq!(task.stat().unwrap().pid, tid.0);
    assert_eq!(task.status().unwrap().tgid, std::process::id() as i32);
    assert_eq!(task.timerslack_ns().unwrap(), 50_000);
    assert_eq!(
        task.namespace("mnt").unwrap(),
        this().namespace("mnt").unwrap()
    );
    drop(stop);
    thread.join().unwrap();
    let e = until(|| task.stat().err());
    assert_eq!(e.kind(), Kind::TargetGone, "{e:?}");
    let e = this().task(tid).unwrap_err();
    assert_eq!(e.kind(), Kind::TargetGone, "{e:?}");
}

#[test]
fn attributes() {
    let limits = this().limits().unwrap();
    for (resource, id) in [
        (
            nix::sys::resource::Resource::RLIMIT_NOFILE,
            libc::RLIMIT_NOFILE,
        ),
        (
            nix::sys::resource::Resource::RLIMIT_STACK,
            libc::RLIMIT_STACK,
        ),
        (
            nix::sys::resource::Resource::RLIMIT_MEMLOCK,
            libc::RLIMIT_MEMLOCK,
        ),
        (nix::sys::resource::Resource::RLIMIT_AS, libc::RLIMIT_AS),
    ] {
        let (soft, hard) = nix::sys::resource::getrlimit(resource).unwrap();
        assert_eq!(limits[id as usize], Limit { soft, hard });
    }
    assert_eq!(this().personality().unwrap(), 0);
    assert!(this().coredump_filter().unwrap().is_some());
    assert!((-1000..=1000).contains(&this().oom_score_adj().unwrap()));
    assert!(!this().cgroups().unwrap().is_empty());
    this().loginuid().unwrap();
    this().wchan().unwrap();
    assert!(this().timers().unwrap().is_empty());
}

#[test]
fn writing_changes_what_is_read() {
    let child = Sleeper::spawn();
    let dir = ProcDir::open(child.pid()).unwrap();
    dir.write("coredump_filter", b"0x7f").unwrap();
    assert_eq!(dir.coredump_filter().unwrap(), Some(0x7f));
    // A name can be written by its own process only.
    let task = this().task(Tid::this()).unwrap();
    task.write("comm", b"a) (b").unwrap();
    assert_eq!(task.stat().unwrap().comm, b"a) (b");
    let e = dir.write("oom_score_adj", b"nonsense").unwrap_err();
    assert_eq!(e.errno(), Some(libc::EINVAL));
}

#[test]
fn no_such_process() {
    let e = ProcDir::open(Pid(0x3fff_ffff)).unwrap_err();
    assert_eq!(e.kind(), Kind::TargetGone);
    let e = this().read("no-such-file").unwrap_err();
    assert_eq!((e.kind(), e.errno()), (Kind::Io, Some(libc::ENOENT)));
}
