//! IPC namespaces: another one is looked at by a thread that enters it, alone, for the moment.
//!
//! # References
//! ipc_namespaces(7), setns(2), proc_sysvipc(5), msgctl(2), msgrcv(2) (MSG_COPY), semctl(2),
//! proc_sys_kernel(5) (`sem_next_id`), fsopen(2)
#![allow(unsafe_code)]

use std::ffi::{CStr, OsString};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use freezeframe_error::{Error, Result, SysExt};
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};

use crate::ids::Pid;
use crate::proc::ProcDir;

/// Ours, or another one.
#[derive(Clone, Debug, Default)]
pub struct IpcNamespace(Option<Arc<OwnedFd>>);

impl IpcNamespace {
    /// That of a process, held from here on, whether it is ours or not.
    pub fn of(process: &ProcDir) -> Result<IpcNamespace> {
        let fd = process.open("ns/ipc", OFlag::O_RDONLY | OFlag::O_CLOEXEC)?;
        Ok(IpcNamespace(Some(Arc::new(fd))))
    }

    /// Whether it is the one we are in.
    pub fn is_ours(&self) -> bool {
        self.0.is_none()
    }

    /// Does some work in it. Only what the work asks of the kernel itself is of this
    /// namespace; a descriptor it opens is ours as any other.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let Some(fd) = &self.0 else {
            return work();
        };
        let enter = || {
            setns(fd.as_fd(), CloneFlags::CLONE_NEWIPC).sys("setns(CLONE_NEWIPC)")?;
            work()
        };
        std::thread::scope(|scope| scope.spawn(enter).join())
            .map_err(|_| Error::bug("a thread in an IPC namespace panicked"))?
    }
}

/// The three sorts of objects of System V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// Segments of shared memory.
    Segments,
    /// Sets of semaphores.
    Semaphores,
    /// Message queues.
    Messages,
}

impl Sort {
    /// What /proc calls it.
    fn word(self) -> &'static str {
        match self {
            Sort::Segments => "shm",
            Sort::Semaphores => "sem",
            Sort::Messages => "msg",
        }
    }
}

/// The ids of all objects of a sort.
pub fn ids(sort: Sort) -> Result<Vec<i32>> {
    let path = format!("/proc/sysvipc/{}", sort.word());
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", e).on(&path))?;
    let id = |line: &str| line.split_whitespace().nth(1)?.parse().ok();
    Ok(text.lines().skip(1).filter_map(id).collect())
}

/// Asks for this id for the object of this sort that is made next, whoever makes it
/// (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN). The kernel forgets it then.
///
/// # Errors
/// EACCES or EPERM without the right.
pub fn set_next_id(sort: Sort, id: i32) -> Result<()> {
    let path = format!("/proc/sys/kernel/{}_next_id", sort.word());
    std::fs::write(&path, id.to_string()).map_err(|e| Error::io("write", e).on(&path))
}

/// Key, owner and permissions of an object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// Its key; 0 is IPC_PRIVATE.
    pub key: i32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Effective user of its creator.
    pub cuid: u32,
    /// Effective group of its creator.
    pub cgid: u32,
    /// Permissions.
    pub mode: u32,
}

fn permissions(perm: &libc::ipc_perm) -> Permissions {
    Permissions {
        key: perm.__key,
        uid: perm.uid,
        gid: perm.gid,
        cuid: perm.cuid,
        cgid: perm.cgid,
        mode: u32::from(perm.mode) & 0o777,
    }
}

/// A set of semaphores.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Semaphores {
    /// Whose it is.
    pub permissions: Permissions,
    /// The value of each.
    pub values: Vec<u16>,
    /// The process that did the last operation on each; 0 is none, or one of another PID namespace.
    pub last: Vec<i32>,
}

/// What there is under this id. Nothing changes by it.
///
/// # Errors
/// EINVAL or EIDRM: there is none.
pub fn semaphores(id: i32) -> Result<Semaphores> {
    // SAFETY: plain integers, of which all zeros is a value.
    let mut ds: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure, which is ours and of the size it knows.
    let done = unsafe { libc::semctl(id, 0, libc::IPC_STAT, &mut ds) };
    control(done, id, "semctl(IPC_STAT)")?;
    let number = ds.sem_nsems as usize;
    let last = (0..number).map(|n| {
        // SAFETY: GETPID takes and gives integers.
        unsafe { libc::semctl(id, n as i32, libc::GETPID) }
    });
    Ok(Semaphores {
        permissions: permissions(&ds.sem_perm),
        last: last.map(|pid| pid.max(0)).collect(),
        values: values(id, number)?,
    })
}

/// The values of a set of `number` semaphores.
fn values(id: i32, number: usize) -> Result<Vec<u16>> {
    let mut values = vec![0u16; number];
    // SAFETY: the number of semaphores of a set never changes, and so many there is room for.
    let done = unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) };
    control(done, id, "semctl(GETALL)")?;
    Ok(values)
}

/// A message queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Messages {
    /// Whose it is.
    pub permissions: Permissions,
    /// Bytes at most (`msg_qbytes`).
    pub limit: u64,
    /// Type and text of each, the first to come first.
    pub messages: Vec<(i64, Vec<u8>)>,
}

/// What there is under this id. Nothing changes by it.
///
/// # Errors
/// EINVAL or EIDRM: there is none, or a message is larger than the namespace now allows
/// (`msgmax`). ENOSYS: the kernel has no MSG_COPY.
pub fn messages(id: i32) -> Result<Messages> {
    // SAFETY: plain integers, of which all zeros is a value.
    let mut ds: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure, which is ours and of the size it knows.
    let done = unsafe { libc::msgctl(id, libc::IPC_STAT, &mut ds) };
    control(done, id, "msgctl(IPC_STAT)")?;
    let mut room = vec![0u64; 1 + (ds.__msg_cbytes as usize).div_ceil(8)];
    let messages = (0..ds.msg_qnum as i64).map(|n| {
        let flags = libc::MSG_COPY | libc::IPC_NOWAIT;
        let size = (room.len() - 1) * 8;
        // SAFETY: there is room for a type (8 bytes) and `size` bytes of text.
        let got = unsafe { libc::msgrcv(id, room.as_mut_ptr().cast(), size, n, flags) };
        control(got as i32, id, "msgrcv(MSG_COPY)")?;
        let text = room[1..].iter().flat_map(|word| word.to_ne_bytes());
        Ok((room[0] as i64, text.take(got as usize).collect()))
    });
    Ok(Messages {
        messages: messages.collect::<Result<_>>()?,
        permissions: permissions(&ds.msg_perm),
        limit: ds.msg_qbytes,
    })
}

fn control(result: i32, id: i32, call: &'static str) -> Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(Error::last_os(call).on(format!("id {id}"))),
    }
}

/// Attaches a segment for the moment, and opens what it maps.
pub fn open_segment(id: i32) -> Result<OwnedFd> {
    // SAFETY: the kernel chooses a place where nothing is; nothing reads or writes it.
    let at = unsafe { libc::shmat(id, std::ptr::null(), libc::SHM_RDONLY) };
    if at as isize == -1 {
        return Err(Error::last_os("shmat").on(crate::sysv::name(id)));
    }
    let opened = open_mapped(at as u64);
    // SAFETY: attached above; nothing refers to it.
    unsafe { libc::shmdt(at) };
    opened
}

/// Opens what we map from this address on.
fn open_mapped(start: u64) -> Result<OwnedFd> {
    let own = ProcDir::open(Pid::this())?;
    let maps = own.maps()?;
    let map = maps.iter().find(|m| m.start == start);
    let map = map.ok_or_else(|| Error::bug("what was just attached is not there"))?;
    let name = format!("map_files/{:x}-{:x}", map.start, map.end);
    own.open(&name, OFlag::O_RDONLY | OFlag::O_CLOEXEC)
}

/// The names of all POSIX message queues, without slashes.
pub fn queue_names() -> Result<Vec<Vec<u8>>> {
    let mount = queue_mount()?;
    let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
    let entries = std::fs::read_dir(&path).map_err(|e| Error::io("open", e).on("mqueue"))?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.map_err(|e| Error::io("getdents64", e).on("mqueue"))?;
        Ok(OsString::into_vec(entry.file_name()))
    };
    entries.map(name).collect()
}

/// The device of the file system of the queues.
pub fn queue_device() -> Result<u64> {
    Ok(crate::fd::fstat(queue_mount()?)?.dev)
}

/// The file system of the queues, mounted nowhere.
fn queue_mount() -> Result<OwnedFd> {
    const FSCONFIG_CMD_CREATE: i32 = 6;
    const FSOPEN_CLOEXEC: i32 = 1;
    const KIND: &CStr = c"mqueue";
    // SAFETY: the name ends with a NUL, the other is a flag.
    let fs = new_fd("fsopen", unsafe {
        libc::syscall(libc::SYS_fsopen, KIND.as_ptr(), FSOPEN_CLOEXEC)
    })?;
    // SAFETY: this command takes neither key nor value.
    let made = unsafe {
        let null = std::ptr::null::<u8>();
        libc::syscall(
            libc::SYS_fsconfig,
            fs.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            null,
            null,
            0,
        )
    };
    if made < 0 {
        return Err(Error::last_os("fsconfig").on("mqueue"));
    }
    // SAFETY: integers alone.
    new_fd("fsmount", unsafe {
        libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSOPEN_CLOEXEC, 0)
    })
}

fn new_fd(call: &'static str, result: i64) -> Result<OwnedFd> {
    if result < 0 {
        return Err(Error::last_os(call).on("mqueue"));
    }
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A namespace with nothing in it, which is not ours.
    fn other() -> IpcNamespace {
        let make = || {
            nix::sched::unshare(CloneFlags::CLONE_NEWIPC).unwrap();
            let dir = ProcDir::open(Pid::this()).unwrap();
            let path = format!("task/{}/ns/ipc", nix::unistd::gettid());
            let fd = dir.open(&path, OFlag::O_RDONLY | OFlag::O_CLOEXEC);
            IpcNamespace(Some(Arc::new(fd.unwrap())))
        };
        std::thread::spawn(make).join().unwrap()
    }

    #[test]
    fn what_is_made_inside_is_seen_inside_alone() {
        let other = other();
        assert!(!other.is_ours() && IpcNamespace::default().is_ours());
        let (id, set) = other
            .inside(|| {
                set_next_id(Sort::Semaphores, 70_001)?;
                // SAFETY: semget and SETVAL take integers alone.
                let id = unsafe { libc::semget(77, 3, libc::IPC_CREAT | 0o640) };
                // SAFETY: numbers only.
                assert_eq!(unsafe { libc::semctl(id, 1, libc::SETVAL, 5) }, 0);
                assert_eq!(ids(Sort::Semaphores)?, [id]);
                Ok((id, semaphores(id)?))
            })
            .unwrap();
        assert_eq!(
            (id, set.permissions.key, set.permissions.mode),
            (70_001, 77, 0o640)
        );
        assert_eq!(set.values, [0, 5, 0]);
        assert_eq!(set.last, [0, std::process::id() as i32, 0]);
        assert!(!ids(Sort::Semaphores).unwrap().contains(&id));
    }

    #[test]
    fn messages_stay_where_they_are() {
        let copied = other().inside(|| {
            // SAFETY: msgget takes integers alone.
            let id = unsafe { libc::msgget(libc::IPC_PRIVATE, 0o600) };
            for (kind, text) in [(3i64, *b"three..."), (1, *b"one.....")] {
                let message = (kind, text);
                // SAFETY: a type, and 5 bytes of the text behind it.
                let sent = unsafe { libc::msgsnd(id, (&raw const message).cast(), 5, 0) };
                assert_eq!(sent, 0);
            }
            assert_eq!(messages(id)?, messages(id)?);
            messages(id)
        });
        let expected = vec![(3, b"three".to_vec()), (1, b"one..".to_vec())];
        assert_eq!(copied.unwrap().messages, expected);
    }

    #[test]
    fn queues_have_names() {
        let names = other().inside(|| {
            let flags = libc::O_CREAT | libc::O_RDWR;
            // SAFETY: the name ends with a NUL; no attributes are given.
            let fd = unsafe { libc::syscall(libc::SYS_mq_open, c"a b".as_ptr(), flags, 0o600, 0) };
            drop(new_fd("mq_open", fd)?);
            queue_names()
        });
        assert_eq!(names.unwrap(), [b"a b".to_vec()]);
    }
}
