//! Open files and directories whose names are gone.

use super::os::{self, PAGE, Region, errno};
use super::{Cx, Program};
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "shared",
        "one deleted file, opened by several processes, is one file",
        shared,
    ),
    Program::new(
        "mapped_too",
        "a deleted file, open and mapped shared by two processes, is one file",
        mapped_too,
    ),
    Program::new("sparse", "the holes of a deleted file stay holes", sparse),
    Program::new(
        "attributes",
        "mode, owner, times and extended attributes of a deleted file",
        attributes,
    ),
    Program::new(
        "directories",
        "a removed directory, open, through O_PATH and as the working directory of two processes, is one directory",
        directories,
    ),
    Program::new(
        "directory_above_gone",
        "deleted files and directories below directories that were removed, too",
        directory_above_gone,
    ),
    Program::new(
        "o_path",
        "O_PATH and write-only descriptors of deleted files",
        o_path,
    ),
    Program::new(
        "name_taken",
        "a deleted file whose name another file has now",
        name_taken,
    )
    .explained(&[("/link", "its old name is taken: it shows another")]),
    Program::new(
        "too_large",
        "a deleted file beyond --ghost-limit is refused",
        too_large,
    )
    .refused("--ghost-limit"),
    Program::new(
        "limit_given",
        "a deleted file of 3 MiB, with --ghost-limit 4M",
        limit_given,
    )
    .dump_args(&["--ghost-limit", "4M"]),
    Program::new(
        "tmpfile_linked_later",
        "a file made with O_TMPFILE can still be given a name",
        tmpfile_linked_later,
    )
    .explained(&[(
        "/flags",
        "O_TMPFILE says how it was opened; no file made otherwise can have it",
    )]),
    Program::new(
        "other_names",
        "a deleted file that has another name stays the same file",
        other_names,
    )
    .dump_args(&["--link-remap"]),
    Program::new(
        "other_names_without_flag",
        "a deleted file that has another name is refused without --link-remap",
        other_names_without_flag,
    )
    .refused("--link-remap"),
    Program::new(
        "other_names_mapped",
        "a mapped deleted file that has another name is refused, with --link-remap too",
        other_names_mapped,
    )
    .dump_args(&["--link-remap"])
    .refused("a mapping of a deleted file"),
];

fn create(path: &Path) -> OwnedFd {
    os::open(path, libc::O_RDWR | libc::O_CREAT).unwrap()
}

fn link_of(fd: &OwnedFd) -> PathBuf {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

fn meta(fd: &OwnedFd) -> fs::Metadata {
    fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

fn inode(fd: &OwnedFd) -> (u64, u64) {
    (meta(fd).dev(), meta(fd).ino())
}

fn content(fd: &OwnedFd, most: usize) -> Vec<u8> {
    os::lseek(fd, 0, libc::SEEK_SET).unwrap();
    os::read_vec(fd, most).unwrap()
}

fn shared(cx: &Cx) {
    let path = cx.path("file");
    let (file, apart) = (create(&path), create(&path));
    os::write(&file, b"by the parent").unwrap();
    let child = cx.child("child", |cx| {
        let own = os::open(&path, libc::O_RDWR | libc::O_APPEND).unwrap();
        fs::write(cx.path("opened"), "").unwrap();
        cx.ready_unspoilt();
        cx.same("one inode", inode(&own), inode(&file));
        cx.same("the position of its own", os::position(&own), 0);
        os::write(&own, b", by the child").unwrap();
    });
    fs::remove_file(&path).unwrap();
    cx.ready(|| os::write(&file, b"x"));
    cx.join("child", child);
    cx.same("one inode", inode(&file), inode(&apart));
    cx.same("links", meta(&file).nlink(), 0);
    cx.same(
        "positions",
        (os::position(&file), os::position(&apart)),
        (13, 0),
    );
    cx.same(
        "contents",
        content(&apart, 99),
        b"by the parent, by the child".to_vec(),
    );
    cx.check(!path.exists(), || "its name is back".to_owned());
}

fn mapped_too(cx: &Cx) {
    let path = cx.path("file");
    let file = create(&path);
    os::write(&file, &os::bytes(5, 3 * PAGE)).unwrap();
    let map = Region::file(&file, 3 * PAGE, libc::MAP_SHARED);
    let private = Region::file(&file, 3 * PAGE, libc::MAP_PRIVATE);
    private.set(0, 77);
    fs::remove_file(&path).unwrap();
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.await_file("word");
        cx.same("the parent's byte", map.get(PAGE), 42);
        os::lseek(&file, 2 * PAGE as i64, libc::SEEK_SET).unwrap();
        os::write(&file, b"by the child").unwrap();
    });
    cx.ready(|| map.set(7, !map.get(7)));
    cx.same("contents", content(&file, 3 * PAGE), os::bytes(5, 3 * PAGE));
    cx.same("the private page", private.get(0), 77);
    map.set(PAGE, 42);
    fs::write(cx.path("word"), "").unwrap();
    cx.join("child", child);
    cx.same("the child's byte", map.get(2 * PAGE), b'b');
}

fn sparse(cx: &Cx) {
    let path = cx.path("file");
    let file = create(&path);
    for mib in [0, 300, 700] {
        os::lseek(&file, mib << 20, libc::SEEK_SET).unwrap();
        os::write(&file, &os::bytes(mib as u64 + 1, 5000)).unwrap();
    }
    os::syscall(libc::SYS_ftruncate, [os::raw(&file), 900 << 20, 0, 0, 0, 0]).unwrap();
    fs::remove_file(&path).unwrap();
    cx.ready(|| os::lseek(&file, 0, libc::SEEK_SET).and_then(|_| os::write(&file, b"x")));
    cx.same("size", meta(&file).len(), 900 << 20);
    cx.check(meta(&file).blocks() < 200, || {
        format!("{} blocks in use", meta(&file).blocks())
    });
    for mib in [0, 300, 700] {
        os::lseek(&file, mib << 20, libc::SEEK_SET).unwrap();
        let what = format!("contents at {mib} MiB");
        cx.same(
            &what,
            os::read_vec(&file, 5000).unwrap(),
            os::bytes(mib as u64 + 1, 5000),
        );
    }
    os::lseek(&file, 500 << 20, libc::SEEK_SET).unwrap();
    cx.same("a hole", os::read_vec(&file, 100).unwrap(), vec![0; 100]);
}

fn set_attribute(fd: &OwnedFd, name: &str, value: &[u8]) {
    let name = CString::new(name).unwrap();
    let args = [
        os::raw(fd),
        name.as_ptr() as usize,
        os::at(value),
        value.len(),
        0,
        0,
    ];
    os::syscall(libc::SYS_fsetxattr, args).unwrap();
}

fn attribute(fd: &OwnedFd, name: &str) -> Vec<u8> {
    let name = CString::new(name).unwrap();
    let mut value = vec![0u8; 4096];
    let args = [
        os::raw(fd),
        name.as_ptr() as usize,
        os::at_mut(&mut value[..]),
        4096,
        0,
        0,
    ];
    let n = os::syscall(libc::SYS_fgetxattr, args).unwrap_or(0);
    value.truncate(n as usize);
    value
}

fn attributes(cx: &Cx) {
    let path = cx.path("file");
    let file = create(&path);
    os::write(&file, b"some").unwrap();
    os::syscall(libc::SYS_fchown, [os::raw(&file), 1234, 4321, 0, 0, 0]).unwrap();
    os::syscall(libc::SYS_fchmod, [os::raw(&file), 0o6751, 0, 0, 0, 0]).unwrap();
    set_attribute(&file, "user.mime", b"text/plain");
    set_attribute(&file, "trusted.more", &[0, 1, 2, 255]);
    let times = [1_000_000_000i64, 123_456_789, 1_500_000_001, 7];
    os::syscall(
        libc::SYS_utimensat,
        [os::raw(&file), 0, os::at(&times), 0, 0, 0],
    )
    .unwrap();
    fs::remove_file(&path).unwrap();
    let state = || {
        let m = meta(&file);
        (
            (m.uid(), m.gid(), m.permissions().mode()),
            [m.atime(), m.atime_nsec(), m.mtime(), m.mtime_nsec()],
            ["user.mime", "trusted.more"].map(|name| attribute(&file, name)),
        )
    };
    let was = state();
    cx.ready(|| set_attribute(&file, "user.mime", b"text/html"));
    let is = state();
    cx.same("owner, group, mode", is.0, was.0);
    cx.same("times", is.1, times);
    cx.same("extended attributes", is.2, was.2);
}

fn open_dir(path: &Path, flags: i32) -> OwnedFd {
    os::open(path, flags | libc::O_DIRECTORY).unwrap()
}

fn directories(cx: &Cx) {
    let path = cx.path("gone");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o711)).unwrap();
    let (read, o_path) = (
        open_dir(&path, libc::O_RDONLY),
        open_dir(&path, libc::O_PATH),
    );
    std::env::set_current_dir(&path).unwrap();
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        let here = fs::metadata("/proc/self/cwd").unwrap();
        cx.same("one inode", (here.dev(), here.ino()), inode(&read));
        let made = fs::write("file", "x");
        cx.check(made.is_err(), || "a file can be made in it".to_owned());
    });
    fs::remove_dir(&path).unwrap();
    let wanted = link_of(&read);
    cx.ready(|| std::env::set_current_dir("/"));
    cx.join("child", child);
    let cwd = fs::read_link("/proc/self/cwd").unwrap();
    cx.same("working directory", &cwd, &wanted);
    cx.same("the others' names", link_of(&read), wanted.clone());
    cx.same("the name of O_PATH", link_of(&o_path), wanted);
    let here = fs::metadata("/proc/self/cwd").unwrap();
    cx.same("one inode", (here.dev(), here.ino()), inode(&read));
    cx.same("one inode, through O_PATH", inode(&o_path), inode(&read));
    cx.same("mode", here.mode() & 0o7777, 0o711);
    cx.same("links", here.nlink(), 0);
    cx.check(!path.exists(), || "its name is back".to_owned());
    std::env::set_current_dir("/").unwrap();
}

fn directory_above_gone(cx: &Cx) {
    let (one, two) = (cx.path("one"), cx.path("one/two"));
    fs::create_dir_all(two.join("three")).unwrap();
    let (file, other) = (create(&two.join("file")), create(&two.join("other")));
    let three = open_dir(&two.join("three"), libc::O_RDONLY);
    os::write(&file, b"below").unwrap();
    fs::remove_dir_all(&one).unwrap();
    let names = || [&file, &other, &three].map(link_of);
    let was = names();
    cx.ready(|| os::write(&file, b"x"));
    cx.same("names", names(), was);
    cx.same("contents", content(&file, 99), b"below".to_vec());
    cx.check(!one.exists(), || "a directory is back".to_owned());
}

fn o_path(cx: &Cx) {
    let path = cx.path("file");
    let write = os::open(&path, libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND).unwrap();
    let read = os::open(&path, libc::O_RDONLY | libc::O_NONBLOCK).unwrap();
    let o_path = os::open(&path, libc::O_PATH).unwrap();
    os::write(&write, b"one").unwrap();
    fs::remove_file(&path).unwrap();
    let state = || [&write, &read, &o_path].map(|fd| (link_of(fd), os::flags(fd)));
    let was = state();
    cx.ready(|| os::write(&write, b"x"));
    cx.same("names and flags", state(), was);
    cx.same("one inode", inode(&o_path), inode(&read));
    os::write(&write, b" two").unwrap();
    cx.same("contents", content(&read, 99), b"one two".to_vec());
    cx.same(
        "errno of a read",
        errno(&os::read_vec(&write, 1)),
        libc::EBADF,
    );
    let again = os::open(
        format!("/proc/self/fd/{}", o_path.as_raw_fd()).as_ref(),
        libc::O_RDONLY,
    )
    .unwrap();
    cx.same("through O_PATH", content(&again, 99), b"one two".to_vec());
}

fn name_taken(cx: &Cx) {
    let path = cx.path("file");
    let old = create(&path);
    os::write(&old, b"old").unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "new").unwrap();
    let new = os::open(&path, libc::O_RDONLY).unwrap();
    cx.ready(|| os::write(&old, b"x"));
    cx.same("the old one", content(&old, 9), b"old".to_vec());
    cx.same("the new one", content(&new, 9), b"new".to_vec());
    cx.same(
        "the file",
        fs::read_to_string(&path).ok(),
        Some("new".to_owned()),
    );
    cx.same(
        "files",
        fs::read_dir(cx.path(""))
            .unwrap()
            .filter(|e| {
                let name = e.as_ref().unwrap().file_name();
                name.to_string_lossy().starts_with("file")
            })
            .count(),
        1,
    );
}

fn filled(cx: &Cx, size: usize) -> OwnedFd {
    let file = create(&cx.path("file"));
    os::write(&file, &os::bytes(9, size)).unwrap();
    fs::remove_file(cx.path("file")).unwrap();
    file
}

fn too_large(cx: &Cx) {
    let file = filled(cx, (1 << 20) + 1);
    cx.ready(|| os::lseek(&file, 0, libc::SEEK_SET));
    cx.same("position", os::position(&file), (1 << 20) + 1);
}

fn limit_given(cx: &Cx) {
    let file = filled(cx, 3 << 20);
    cx.ready(|| {
        os::lseek(&file, 5, libc::SEEK_SET).unwrap();
        os::write(&file, b"x")
    });
    cx.same("size", meta(&file).len(), 3 << 20);
    cx.check(content(&file, 3 << 20) == os::bytes(9, 3 << 20), || {
        "its contents differ".to_owned()
    });
}

fn tmpfile_linked_later(cx: &Cx) {
    let file = os::open(&cx.path(""), libc::O_RDWR | libc::O_TMPFILE).unwrap();
    os::write(&file, b"named at last").unwrap();
    cx.ready(|| os::lseek(&file, 0, libc::SEEK_SET).and_then(|_| os::write(&file, b"x")));
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let to = CString::new(cx.path("named").as_os_str().as_encoded_bytes()).unwrap();
    let here = libc::AT_FDCWD as usize;
    let linked = os::syscall(
        libc::SYS_linkat,
        [
            here,
            from.as_ptr() as usize,
            here,
            to.as_ptr() as usize,
            libc::AT_SYMLINK_FOLLOW as usize,
            0,
        ],
    );
    cx.check(linked.is_ok(), || format!("linkat: {linked:?}"));
    cx.same(
        "the file",
        fs::read_to_string(cx.path("named")).ok(),
        Some("named at last".to_owned()),
    );
}

fn two_names(cx: &Cx) -> (OwnedFd, OwnedFd) {
    let (gone, kept) = (cx.path("gone"), cx.path("kept"));
    let file = create(&gone);
    os::write(&file, b"both names").unwrap();
    let append = os::open(&gone, libc::O_WRONLY | libc::O_APPEND).unwrap();
    fs::hard_link(&gone, &kept).unwrap();
    fs::remove_file(&gone).unwrap();
    (file, append)
}

fn other_names(cx: &Cx) {
    let (file, append) = two_names(cx);
    let names = || [&file, &append].map(|fd| (link_of(fd), os::flags(fd)));
    let was = names();
    cx.ready(|| os::lseek(&file, 0, libc::SEEK_SET));
    cx.same("names and flags", names(), was);
    cx.same("position", os::position(&file), 10);
    let kept = fs::metadata(cx.path("kept")).unwrap();
    cx.same("one inode", inode(&file), (kept.dev(), kept.ino()));
    os::write(&append, b", one file").unwrap();
    cx.same(
        "contents",
        fs::read_to_string(cx.path("kept")).ok(),
        Some("both names, one file".to_owned()),
    );
    cx.check(!cx.path("gone").exists(), || "its name is back".to_owned());
}

fn other_names_without_flag(cx: &Cx) {
    let (file, _append) = two_names(cx);
    cx.ready(|| os::lseek(&file, 0, libc::SEEK_SET));
    cx.same("position", os::position(&file), 10);
    cx.same("links", meta(&file).nlink(), 1);
}

fn other_names_mapped(cx: &Cx) {
    let (file, append) = two_names(cx);
    let map = Region::file(&file, PAGE, libc::MAP_SHARED);
    drop((file, append));
    cx.ready(|| map.set(0, b'x'));
    cx.same("its first byte", map.get(0), b'b');
}
