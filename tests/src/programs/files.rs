//! Open files of file systems, and the properties every descriptor has.

use super::os::{self, errno};
use super::{Cx, Program};
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "regular",
        "a regular file: position, name, contents, and reads and writes go on from there",
        regular,
    ),
    Program::new(
        "status_flags",
        "O_APPEND, O_NONBLOCK, O_SYNC, O_DSYNC, O_DIRECT, O_NOATIME, access modes",
        status_flags,
    ),
    Program::new(
        "owner",
        "F_SETOWN, F_SETOWN_EX and F_SETSIG of a descriptor",
        owner,
    ),
    Program::new(
        "append",
        "writes through O_APPEND go to the end, where others wrote meanwhile",
        append,
    ),
    Program::new(
        "directory",
        "a directory: getdents goes on, openat works",
        directory,
    ),
    Program::new(
        "o_path",
        "O_PATH of a file, a directory and a symbolic link",
        o_path,
    ),
    Program::new(
        "char_devices",
        "/dev/null, zero, full, random, urandom",
        char_devices,
    ),
    Program::new(
        "shared_position",
        "descriptors made by dup share one position, those opened apart do not",
        shared_position,
    ),
    Program::new(
        "shared_with_child",
        "parent and child share one position",
        shared_with_child,
    ),
    Program::new(
        "cloexec",
        "close-on-exec belongs to the descriptor, not the open file",
        cloexec,
    ),
    Program::new(
        "numbers",
        "descriptors have their numbers, with gaps, up to the limit",
        numbers,
    ),
    Program::new(
        "position_past_end",
        "a position beyond the end, of a sparse file",
        position_past_end,
    ),
    Program::new(
        "odd_names",
        "names with newlines, spaces and bytes that are no UTF-8",
        odd_names,
    ),
    Program::new(
        "read_only_file",
        "a file opened for writing before it lost its write permission",
        read_only_file,
    ),
    Program::new(
        "memfd",
        "a memfd: contents, size, position, name, mode",
        memfd,
    ),
    Program::new("memfd_seals", "the seals of a memfd hold", memfd_seals),
    Program::new(
        "memfd_shared",
        "a memfd open in two processes, once more for reading only, and mapped",
        memfd_shared,
    ),
    Program::new(
        "owner_outside",
        "F_SETOWN of a process outside the tree",
        owner_outside,
    )
    .refused("F_SETOWN"),
    Program::new(
        "renamed",
        "an open file and a directory that were renamed",
        renamed,
    ),
    Program::new(
        "proc_files",
        "open files of /proc of processes and threads of the tree",
        proc_files,
    )
    .explained(&[("/ino", "numbers of /proc, made as they are asked for")]),
    Program::new(
        "proc_of_another",
        "an open file of /proc of a process outside the tree",
        proc_of_another,
    )
    .refused("a process outside the tree"),
    Program::new("dnotify", "a directory with F_NOTIFY", dnotify).refused("dnotify"),
    Program::new("deleted", "an open file whose name is gone", deleted),
    Program::new("tmpfile", "a file made with O_TMPFILE", tmpfile).explained(&[(
        "/flags",
        "O_TMPFILE says how it was opened; no file made otherwise can have it",
    )]),
];

fn regular(cx: &Cx) {
    let path = cx.path("file");
    fs::write(&path, os::bytes(1, 10_000)).unwrap();
    let read = os::open(&path, libc::O_RDONLY).unwrap();
    let write = os::open(&path, libc::O_WRONLY).unwrap();
    os::lseek(&read, 1234, libc::SEEK_SET).unwrap();
    os::lseek(&write, 5000, libc::SEEK_SET).unwrap();
    cx.ready(|| os::lseek(&read, 1, libc::SEEK_CUR));
    cx.same(
        "position",
        (os::position(&read), os::position(&write)),
        (1234, 5000),
    );
    cx.same(
        "what is read",
        os::read_vec(&read, 10).unwrap(),
        os::bytes(1, 10_000)[1234..1244].to_vec(),
    );
    os::write(&write, b"written here").unwrap();
    cx.same(
        "what was written",
        fs::read(&path).unwrap()[5000..5012].to_vec(),
        b"written here".to_vec(),
    );
    cx.same(
        "errno of a write to the read-only one",
        errno(&os::write(&read, b"x")),
        libc::EBADF,
    );
    cx.same(
        "errno of a read from the write-only one",
        errno(&os::read_vec(&write, 1)),
        libc::EBADF,
    );
}

fn status_flags(cx: &Cx) {
    let path = cx.path("file");
    fs::write(&path, "x").unwrap();
    let sets = [
        libc::O_RDONLY,
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDWR | libc::O_APPEND,
        libc::O_RDWR | libc::O_NONBLOCK,
        libc::O_RDWR | libc::O_DSYNC,
        libc::O_RDWR | libc::O_SYNC,
        libc::O_RDONLY | libc::O_DIRECT,
        libc::O_RDONLY | libc::O_NOATIME,
        libc::O_RDONLY | libc::O_NOFOLLOW,
        libc::O_WRONLY | libc::O_APPEND | libc::O_NONBLOCK | libc::O_CLOEXEC,
    ];
    let open: Vec<OwnedFd> = sets.iter().map(|s| os::open(&path, *s).unwrap()).collect();
    let was: Vec<i32> = open.iter().map(os::flags).collect();
    cx.ready(|| os::fcntl(&open[2], libc::F_SETFL, libc::O_APPEND as usize));
    cx.same("flags", open.iter().map(os::flags).collect(), was);
}

// linux/fcntl.h; not in libc.
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_OWNER_TID: i32 = 0;
const F_OWNER_PGRP: i32 = 2;

fn owner(cx: &Cx) {
    let (r, _w) = os::pipe(0);
    let (s, _t) = os::socketpair(libc::SOCK_STREAM);
    let (u, _v) = os::pipe(0);
    os::fcntl(&r, libc::F_SETOWN, os::getpid() as usize).unwrap();
    os::fcntl(&r, F_SETSIG, libc::SIGUSR1 as usize).unwrap();
    let group = [F_OWNER_PGRP, os::getpgid(0)];
    os::fcntl(&s, F_SETOWN_EX, os::at(&group)).unwrap();
    let thread = [F_OWNER_TID, os::gettid()];
    os::fcntl(&u, F_SETOWN_EX, os::at(&thread)).unwrap();
    let state = || {
        [&r, &s, &u].map(|fd| {
            let mut owner = [0i32; 2];
            os::fcntl(fd, F_GETOWN_EX, os::at_mut(&mut owner)).unwrap();
            (owner, os::fcntl(fd, F_GETSIG, 0).unwrap())
        })
    };
    let was = state();
    cx.ready(|| os::fcntl(&r, F_SETSIG, 0));
    cx.same("owners and signals", state(), was);
}

fn owner_outside(cx: &Cx) {
    let (r, _w) = os::pipe(0);
    os::fcntl(&r, libc::F_SETOWN, 1).unwrap();
    cx.ready(|| os::fcntl(&r, libc::F_SETOWN, 0));
    cx.same("owner", os::fcntl(&r, libc::F_GETOWN, 0).ok(), Some(1));
}

fn append(cx: &Cx) {
    let path = cx.path("log");
    fs::write(&path, "one\n").unwrap();
    let log = os::open(&path, libc::O_WRONLY | libc::O_APPEND).unwrap();
    os::write(&log, b"two\n").unwrap();
    cx.ready(|| os::fcntl(&log, libc::F_SETFL, 0));
    let other = os::open(&path, libc::O_WRONLY | libc::O_APPEND).unwrap();
    os::write(&other, b"three\n").unwrap();
    os::lseek(&log, 0, libc::SEEK_SET).unwrap();
    os::write(&log, b"four\n").unwrap();
    cx.same(
        "the file",
        fs::read_to_string(&path).unwrap(),
        "one\ntwo\nthree\nfour\n".to_owned(),
    );
}

/// The names of one getdents64 call with room for a few.
fn entries(dir: &OwnedFd, room: usize) -> Vec<Vec<u8>> {
    let mut buffer = vec![0u8; room];
    let n = os::syscall(
        libc::SYS_getdents64,
        [os::raw(dir), os::at_mut(&mut buffer[..]), room, 0, 0, 0],
    )
    .unwrap();
    let (mut names, mut at) = (Vec::new(), 0);
    while at < n as usize {
        let len = usize::from(u16::from_le_bytes([buffer[at + 16], buffer[at + 17]]));
        let name = &buffer[at + 19..at + len];
        names.push(name.split(|b| *b == 0).next().unwrap().to_vec());
        at += len;
    }
    names
}

fn directory(cx: &Cx) {
    let path = cx.path("dir");
    fs::create_dir(&path).unwrap();
    for i in 0..60 {
        fs::write(path.join(format!("file{i:03}")), "x").unwrap();
    }
    let dir = os::open(&path, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    let whole = os::open(&path, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    let all = entries(&whole, 8192);
    let first = entries(&dir, 400);
    cx.ready(|| os::lseek(&dir, 0, libc::SEEK_SET));
    let mut got = first;
    loop {
        let more = entries(&dir, 400);
        if more.is_empty() {
            break;
        }
        got.extend(more);
    }
    cx.same("all the entries, in order", got, all);
    let inside = os::fd_from(
        libc::SYS_openat,
        [os::raw(&dir), c"file007".as_ptr() as usize, 0, 0, 0, 0],
    );
    cx.check(inside.is_ok(), || format!("openat: {inside:?}"));
}

fn o_path(cx: &Cx) {
    let (file, link) = (cx.path("file"), cx.path("link"));
    fs::write(&file, "x").unwrap();
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let open = [
        os::open(&file, libc::O_PATH).unwrap(),
        os::open(
            &cx.path(""),
            libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC,
        )
        .unwrap(),
        os::open(&link, libc::O_PATH | libc::O_NOFOLLOW).unwrap(),
    ];
    let state = || {
        open.each_ref().map(|fd| {
            let path = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
            (
                path,
                os::flags(fd),
                os::cloexec(fd),
                errno(&os::read_vec(fd, 1)),
            )
        })
    };
    let was = state();
    cx.ready(|| os::fcntl(&open[1], libc::F_SETFD, 0));
    cx.same("name, flags, close-on-exec, errno of read", state(), was);
    cx.same(
        "errno of a read through O_PATH",
        errno(&os::read_vec(&open[0], 1)),
        libc::EBADF,
    );
    let mut target = [0u8; 64];
    let n = os::syscall(
        libc::SYS_readlinkat,
        [
            os::raw(&open[2]),
            c"".as_ptr() as usize,
            os::at_mut(&mut target),
            target.len(),
            0,
            0,
        ],
    );
    cx.same(
        "the link read through its descriptor",
        n.map(|n| target[..n as usize].to_vec()).ok(),
        Some(b"nowhere".to_vec()),
    );
}

fn char_devices(cx: &Cx) {
    let open = ["null", "zero", "full", "random", "urandom"].map(|name| {
        (
            name,
            os::open(
                format!("/dev/{name}").as_ref(),
                libc::O_RDWR | libc::O_NONBLOCK,
            )
            .unwrap(),
        )
    });
    let state = || {
        open.each_ref().map(|(_, fd)| {
            (
                fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap(),
                os::flags(fd),
            )
        })
    };
    let was = state();
    cx.ready(|| os::fcntl(&open[0].1, libc::F_SETFL, 0));
    cx.same("name and flags", state(), was);
    let [null, zero, full, random, urandom] = open.each_ref().map(|(_, fd)| fd);
    cx.same("null", os::read_vec(null, 4).ok(), Some(Vec::new()));
    cx.same("zero", os::read_vec(zero, 4).ok(), Some(vec![0; 4]));
    cx.same("full", errno(&os::write(full, b"x")), libc::ENOSPC);
    cx.same(
        "random",
        os::read_vec(random, 16).map(|v| v.len()).ok(),
        Some(16),
    );
    cx.same(
        "urandom",
        os::read_vec(urandom, 16).map(|v| v.len()).ok(),
        Some(16),
    );
}

fn shared_position(cx: &Cx) {
    let path = cx.path("file");
    fs::write(&path, os::bytes(1, 1000)).unwrap();
    let one = os::open(&path, libc::O_RDWR).unwrap();
    let two = one.try_clone().unwrap();
    let apart = os::open(&path, libc::O_RDWR).unwrap();
    os::lseek(&one, 100, libc::SEEK_SET).unwrap();
    os::lseek(&apart, 300, libc::SEEK_SET).unwrap();
    cx.ready(|| os::lseek(&two, 5, libc::SEEK_SET));
    cx.same(
        "positions",
        (os::position(&one), os::position(&two), os::position(&apart)),
        (100, 100, 300),
    );
    os::lseek(&two, 222, libc::SEEK_SET).unwrap();
    cx.same(
        "positions after a seek of the second",
        (os::position(&one), os::position(&apart)),
        (222, 300),
    );
    os::fcntl(&one, libc::F_SETFL, libc::O_APPEND as usize).unwrap();
    cx.check(os::flags(&two) & libc::O_APPEND != 0, || {
        "flags are not shared".to_owned()
    });
    cx.check(os::flags(&apart) & libc::O_APPEND == 0, || {
        "flags of another open file changed".to_owned()
    });
    let me = os::getpid();
    cx.check(
        os::same_file(me, one.as_raw_fd(), me, two.as_raw_fd()),
        || "kcmp: not one open file".to_owned(),
    );
    cx.check(
        !os::same_file(me, one.as_raw_fd(), me, apart.as_raw_fd()),
        || "kcmp: one open file".to_owned(),
    );
}

fn shared_with_child(cx: &Cx) {
    let path = cx.path("file");
    fs::write(&path, os::bytes(1, 1000)).unwrap();
    let file = os::open(&path, libc::O_RDWR).unwrap();
    os::lseek(&file, 10, libc::SEEK_SET).unwrap();
    let child = cx.child("child", |cx| {
        os::fcntl(&file, libc::F_SETFD, libc::FD_CLOEXEC as usize).unwrap();
        let own = os::open(&path, libc::O_RDWR).unwrap();
        // Moves to another number, so that the two processes know the open file by different ones.
        let high = os::fcntl(&file, libc::F_DUPFD, 50).unwrap();
        cx.ready_unspoilt();
        cx.same("position", os::position(&file), 10);
        cx.same("position of its own", os::position(&own), 0);
        os::lseek(&high_fd(high), 500, libc::SEEK_SET).unwrap();
    });
    cx.ready(|| os::lseek(&file, 11, libc::SEEK_SET));
    cx.join("child", child);
    cx.same("position after the child's seek", os::position(&file), 500);
    cx.check(!os::cloexec(&file), || {
        "close-on-exec came from the child".to_owned()
    });
}

fn high_fd(fd: i64) -> OwnedFd {
    // SAFETY: a descriptor this process has just made with F_DUPFD and that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn cloexec(cx: &Cx) {
    let with = os::open("/dev/null".as_ref(), libc::O_RDONLY | libc::O_CLOEXEC).unwrap();
    let without = high_fd(os::fcntl(&with, libc::F_DUPFD, 0).unwrap());
    let file = os::open(
        &cx.path("f"),
        libc::O_RDWR | libc::O_CREAT | libc::O_CLOEXEC,
    )
    .unwrap();
    cx.ready(|| os::fcntl(&without, libc::F_SETFD, 1));
    cx.same(
        "close-on-exec",
        [&with, &without, &file].map(os::cloexec),
        [true, false, true],
    );
    let me = os::getpid();
    cx.check(
        os::same_file(me, with.as_raw_fd(), me, without.as_raw_fd()),
        || "not one open file".to_owned(),
    );
}

fn numbers(cx: &Cx) {
    let zero = os::open("/dev/zero".as_ref(), libc::O_RDONLY).unwrap();
    let limit = os::limit(libc::RLIMIT_NOFILE as i32).0 as usize;
    let wanted = [10, 63, 64, 65, 255, 256, 1000, limit - 1];
    let open = wanted.map(|n| high_fd(os::fcntl(&zero, libc::F_DUPFD, n).unwrap()));
    let listed = || {
        let mut all: Vec<i32> = fs::read_dir("/proc/self/fd")
            .unwrap()
            .map(|e| {
                e.unwrap()
                    .file_name()
                    .into_string()
                    .unwrap()
                    .parse()
                    .unwrap()
            })
            .collect();
        all.sort_unstable();
        all
    };
    let was = listed();
    cx.ready(|| os::syscall(libc::SYS_close, [255, 0, 0, 0, 0, 0]));
    cx.same("the numbers", listed(), was);
    for fd in &open {
        cx.same("a read", os::read_vec(fd, 1).ok(), Some(vec![0]));
    }
    open.into_iter().for_each(std::mem::forget);
}

fn position_past_end(cx: &Cx) {
    let path = cx.path("file");
    let file = os::open(&path, libc::O_RDWR | libc::O_CREAT).unwrap();
    os::syscall(libc::SYS_ftruncate, [os::raw(&file), 1 << 40, 0, 0, 0, 0]).unwrap();
    os::lseek(&file, (1 << 40) + 77, libc::SEEK_SET).unwrap();
    cx.ready(|| os::lseek(&file, 0, libc::SEEK_SET));
    cx.same("position", os::position(&file), (1 << 40) + 77);
    cx.same("size", fs::metadata(&path).unwrap().len(), 1 << 40);
}

fn odd_names(cx: &Cx) {
    use std::os::unix::ffi::OsStrExt;
    let names: [&[u8]; 5] = [
        b"new\nline",
        b"spa ce",
        b"\xff\xfe\x80",
        b"back\\slash \\012",
        b"file (deleted)",
    ];
    let paths = names.map(|n| cx.path("").join(std::ffi::OsStr::from_bytes(n)));
    let open = paths
        .each_ref()
        .map(|p| os::open(p, libc::O_RDWR | libc::O_CREAT).unwrap());
    for (fd, name) in open.iter().zip(names) {
        os::write(fd, name).unwrap();
    }
    let map = os::Region::file(&open[0], os::PAGE, libc::MAP_PRIVATE);
    cx.ready(|| os::write(&open[2], b"x"));
    for ((fd, path), name) in open.iter().zip(&paths).zip(names) {
        cx.same(
            "name",
            &fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap(),
            path,
        );
        cx.same("position", os::position(fd), name.len() as i64);
    }
    cx.same("mapped", map.get(0), b'n');
}

fn read_only_file(cx: &Cx) {
    use std::os::unix::fs::PermissionsExt;
    let path = cx.path("file");
    let file = os::open(&path, libc::O_RDWR | libc::O_CREAT).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    cx.ready(|| fs::remove_file(&path));
    cx.check(os::write(&file, b"still").is_ok(), || {
        "cannot write".to_owned()
    });
    cx.same(
        "mode",
        fs::metadata(&path)
            .map(|m| m.permissions().mode() & 0o777)
            .ok(),
        Some(0),
    );
    cx.same("contents", fs::read(&path).ok(), Some(b"still".to_vec()));
}

fn make_memfd(name: &std::ffi::CStr, flags: u32) -> OwnedFd {
    os::fd_from(
        libc::SYS_memfd_create,
        [name.as_ptr() as usize, flags as usize, 0, 0, 0, 0],
    )
    .unwrap()
}

fn memfd(cx: &Cx) {
    let plain = make_memfd(c"plain name", 0);
    let sparse = make_memfd(c"", libc::MFD_CLOEXEC);
    os::write(&plain, &os::bytes(1, 12_345)).unwrap();
    os::lseek(&plain, 1000, libc::SEEK_SET).unwrap();
    os::syscall(
        libc::SYS_ftruncate,
        [os::raw(&sparse), 64 << 20, 0, 0, 0, 0],
    )
    .unwrap();
    os::lseek(&sparse, 32 << 20, libc::SEEK_SET).unwrap();
    os::write(&sparse, b"in the middle").unwrap();
    os::syscall(libc::SYS_fchmod, [os::raw(&sparse), 0o640, 0, 0, 0, 0]).unwrap();
    let state = || {
        [&plain, &sparse].map(|fd| {
            let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
            let file = fs::File::from(fd.try_clone().unwrap());
            let meta = file.metadata().unwrap();
            let blocks = std::os::unix::fs::MetadataExt::blocks(&meta);
            (
                link,
                meta.len(),
                meta.permissions(),
                blocks,
                os::position(fd),
                os::flags(fd),
                os::cloexec(fd),
            )
        })
    };
    let was = state();
    cx.ready(|| os::write(&plain, b"x"));
    cx.same("name, size, mode, blocks, position, flags", state(), was);
    cx.same(
        "contents",
        os::read_vec(&plain, 20_000).unwrap(),
        os::bytes(1, 12_345)[1000..].to_vec(),
    );
    os::lseek(&sparse, 32 << 20, libc::SEEK_SET).unwrap();
    cx.same(
        "in the middle",
        os::read_vec(&sparse, 13).unwrap(),
        b"in the middle".to_vec(),
    );
    os::lseek(&plain, 0, libc::SEEK_SET).unwrap();
    cx.same(
        "the first part",
        os::read_vec(&plain, 1000).unwrap(),
        os::bytes(1, 12_345)[..1000].to_vec(),
    );
}

fn memfd_seals(cx: &Cx) {
    let sets = [
        0,
        libc::F_SEAL_SEAL,
        libc::F_SEAL_SHRINK,
        libc::F_SEAL_GROW,
        libc::F_SEAL_WRITE,
        libc::F_SEAL_FUTURE_WRITE,
        libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL,
    ];
    let fds = sets.map(|seals| {
        let fd = make_memfd(c"sealed", libc::MFD_ALLOW_SEALING);
        os::write(&fd, b"some contents").unwrap();
        os::fcntl(&fd, libc::F_ADD_SEALS, seals as usize).unwrap();
        fd
    });
    let unsealable = make_memfd(c"unsealable", 0);
    let noexec = make_memfd(c"noexec", 8 /* MFD_NOEXEC_SEAL */);
    let get = |fd: &OwnedFd| os::fcntl(fd, libc::F_GET_SEALS, 0).unwrap() as i32;
    let was = (fds.each_ref().map(get), get(&unsealable), get(&noexec));
    cx.ready(|| {
        drop(os::fcntl(
            &fds[2],
            libc::F_ADD_SEALS,
            libc::F_SEAL_GROW as usize,
        ))
    });
    cx.same(
        "seals",
        (fds.each_ref().map(get), get(&unsealable), get(&noexec)),
        was,
    );
    cx.same(
        "errno of a write",
        errno(&os::write(&fds[4], b"x")),
        libc::EPERM,
    );
    let shrink = os::syscall(libc::SYS_ftruncate, [os::raw(&fds[2]), 1, 0, 0, 0, 0]);
    cx.same("errno of a shrink", errno(&shrink), libc::EPERM);
    for fd in &fds {
        os::lseek(fd, 0, libc::SEEK_SET).unwrap();
        cx.same(
            "contents",
            os::read_vec(fd, 99).unwrap(),
            b"some contents".to_vec(),
        );
    }
    let later = os::fcntl(&fds[2], libc::F_ADD_SEALS, libc::F_SEAL_GROW as usize);
    cx.check(later.is_ok(), || format!("a further seal: {later:?}"));
}

fn memfd_shared(cx: &Cx) {
    let fd = make_memfd(c"shared", libc::MFD_ALLOW_SEALING);
    os::syscall(libc::SYS_ftruncate, [os::raw(&fd), 8192, 0, 0, 0, 0]).unwrap();
    let map = os::Region::file(&fd, 8192, libc::MAP_SHARED);
    map.fill(7);
    let read_only = os::open(
        format!("/proc/self/fd/{}", fd.as_raw_fd()).as_ref(),
        libc::O_RDONLY,
    )
    .unwrap();
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.await_file("word");
        cx.same(
            "the parent's word",
            map.word(0).load(std::sync::atomic::Ordering::SeqCst),
            4711,
        );
        map.word(4).store(1147, std::sync::atomic::Ordering::SeqCst);
    });
    cx.ready(|| map.set(5000, !map.get(5000)));
    cx.try_part("contents", || map.verify(7));
    map.word(0).store(4711, std::sync::atomic::Ordering::SeqCst);
    fs::write(cx.path("word"), "").unwrap();
    cx.join("child", child);
    cx.same(
        "the child's word",
        map.word(4).load(std::sync::atomic::Ordering::SeqCst),
        1147,
    );
    cx.same(
        "the same through the read-only file",
        os::read_vec(&read_only, 8).unwrap()[4..].to_vec(),
        1147u32.to_le_bytes().to_vec(),
    );
    cx.same(
        "errno of a write to it",
        errno(&os::write(&read_only, b"x")),
        libc::EBADF,
    );
}

fn deleted(cx: &Cx) {
    let path = cx.path("file");
    let file = os::open(&path, libc::O_RDWR | libc::O_CREAT).unwrap();
    os::write(&file, b"not lost").unwrap();
    fs::remove_file(&path).unwrap();
    cx.ready(|| os::lseek(&file, 1, libc::SEEK_SET));
    cx.same("position", os::position(&file), 8);
    os::lseek(&file, 0, libc::SEEK_SET).unwrap();
    cx.same(
        "contents",
        os::read_vec(&file, 99).unwrap(),
        b"not lost".to_vec(),
    );
    cx.check(!path.exists(), || "its name is back".to_owned());
}

fn tmpfile(cx: &Cx) {
    let file = os::open(&cx.path(""), libc::O_RDWR | libc::O_TMPFILE).unwrap();
    os::write(&file, b"never had a name").unwrap();
    cx.ready(|| os::lseek(&file, 1, libc::SEEK_SET));
    cx.same("position", os::position(&file), 16);
    os::lseek(&file, 0, libc::SEEK_SET).unwrap();
    cx.same(
        "contents",
        os::read_vec(&file, 99).unwrap(),
        b"never had a name".to_vec(),
    );
}

fn renamed(cx: &Cx) {
    let (dir, file) = (cx.path("dir"), cx.path("dir/file"));
    fs::create_dir(&dir).unwrap();
    fs::write(&file, "0123456789").unwrap();
    let open = os::open(&file, libc::O_RDONLY).unwrap();
    let open_dir = os::open(&dir, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    os::lseek(&open, 4, libc::SEEK_SET).unwrap();
    fs::rename(&file, dir.join("new name")).unwrap();
    fs::rename(&dir, cx.path("new dir")).unwrap();
    cx.ready(|| os::lseek(&open, 0, libc::SEEK_SET));
    cx.same(
        "what is read",
        os::read_vec(&open, 3).ok(),
        Some(b"456".to_vec()),
    );
    let link = |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    cx.same("its name", link(&open), cx.path("new dir/new name"));
    cx.same("the directory's name", link(&open_dir), cx.path("new dir"));
}

fn proc_files(cx: &Cx) {
    let child = cx.child("child", |cx| {
        let parent = format!("/proc/{}/stat", os::getppid());
        let parent = os::open(parent.as_ref(), libc::O_RDONLY).unwrap();
        cx.ready_unspoilt();
        let stat = os::read_vec(&parent, 99).unwrap_or_default();
        let begin = format!("{} (", os::getppid());
        cx.check(stat.starts_with(begin.as_bytes()), || {
            "the parent's stat is of another".to_owned()
        });
    });
    let status = os::open("/proc/self/status".as_ref(), libc::O_RDONLY).unwrap();
    let first = os::read_vec(&status, 6).unwrap();
    let task = format!("/proc/self/task/{}/comm", os::gettid());
    let task = os::open(task.as_ref(), libc::O_RDWR).unwrap();
    let of_child = os::open(format!("/proc/{child}/stat").as_ref(), libc::O_RDONLY).unwrap();
    let memory = os::open("/proc/self/mem".as_ref(), libc::O_RDWR).unwrap();
    let fds = os::open("/proc/self/fd".as_ref(), libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    let total = os::open("/proc/meminfo".as_ref(), libc::O_RDONLY).unwrap();
    cx.ready(|| os::lseek(&status, 0, libc::SEEK_SET));
    cx.same("read before", first, b"Name:\t".to_vec());
    cx.same(
        "read on",
        os::read_vec(&status, 10).ok(),
        Some(b"ff-program".to_vec()),
    );
    os::write(&task, b"renamed").unwrap();
    cx.same(
        "the name set through it",
        os::status_line("self", "Name"),
        "renamed".to_owned(),
    );
    let stat = os::read_vec(&of_child, 99).unwrap_or_default();
    cx.check(stat.starts_with(format!("{child} (").as_bytes()), || {
        "stat is of another".to_owned()
    });
    let word = 0x1234_5678_9abc_def0u64;
    os::lseek(&memory, os::at(&word) as i64, libc::SEEK_SET).unwrap();
    cx.same(
        "memory",
        os::read_vec(&memory, 8).ok(),
        Some(word.to_ne_bytes().to_vec()),
    );
    let names = entries(&fds, 4096);
    let own = fds.as_raw_fd().to_string().into_bytes();
    cx.check(names.contains(&own), || {
        "its own number is not listed".to_owned()
    });
    cx.check(
        os::read_vec(&total, 8).is_ok_and(|v| v == b"MemTotal"),
        || "meminfo".to_owned(),
    );
    cx.join("child", child);
}

fn proc_of_another(cx: &Cx) {
    let file = os::open("/proc/1/status".as_ref(), libc::O_RDONLY).unwrap();
    let first = os::read_vec(&file, 6).unwrap();
    cx.ready(|| os::lseek(&file, 0, libc::SEEK_SET));
    cx.same("read before", first, b"Name:\t".to_vec());
    cx.same("position", os::position(&file), 6);
}

fn dnotify(cx: &Cx) {
    const F_NOTIFY: i32 = 1026;
    const DN_CREATE_MULTISHOT: usize = 0x8000_0004;
    // Blocked, so that it waits to be seen.
    let mask = 1u64 << (libc::SIGIO - 1);
    let args = [libc::SIG_BLOCK as usize, os::at(&mask), 0, 8, 0, 0];
    os::syscall(libc::SYS_rt_sigprocmask, args).unwrap();
    let path = cx.path("dir");
    fs::create_dir(&path).unwrap();
    let dir = os::open(&path, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    os::fcntl(&dir, F_NOTIFY, DN_CREATE_MULTISHOT).unwrap();
    cx.ready(|| os::fcntl(&dir, F_NOTIFY, 0));
    fs::write(path.join("new"), "").unwrap();
    let pending = || {
        let of = |name| u64::from_str_radix(os::status_line("self", name).trim(), 16);
        (of("SigPnd").unwrap_or(0) | of("ShdPnd").unwrap_or(0)) & mask != 0
    };
    cx.check(cx.until(pending), || "it did not tell".to_owned());
}
