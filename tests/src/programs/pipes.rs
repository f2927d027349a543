//! Pipes and FIFOs.

use super::os::{self, errno};
use super::{Cx, Program};
use std::os::fd::{AsRawFd, OwnedFd};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "pipe_data",
        "what is in a pipe is there, byte for byte, and nothing else",
        pipe_data,
    ),
    Program::new("pipe_empty", "an empty pipe is empty and works", pipe_empty),
    Program::new(
        "pipe_full",
        "a full pipe of 64 KiB made of single writes of odd sizes stays full",
        pipe_full,
    ),
    Program::new(
        "pipe_size",
        "a pipe has the size F_SETPIPE_SZ gave it, and its data",
        pipe_size,
    ),
    Program::new(
        "pipe_packets",
        "a pipe in packet mode (O_DIRECT) keeps the borders of its packets",
        pipe_packets,
    ),
    Program::new(
        "pipe_flags",
        "the two ends have their own O_NONBLOCK, O_ASYNC and close-on-exec",
        pipe_flags,
    ),
    Program::new(
        "pipe_no_writer",
        "a pipe whose writer is gone gives its data, then end of file",
        pipe_no_writer,
    ),
    Program::new(
        "pipe_no_reader",
        "a pipe whose reader is gone gives EPIPE",
        pipe_no_reader,
    ),
    Program::new(
        "pipe_across",
        "a pipe between parent and child carries on, with the data in it",
        pipe_across,
    ),
    Program::new(
        "pipe_reopened",
        "a pipe end opened again by /proc/self/fd is an open file of its own",
        pipe_reopened,
    ),
    Program::new(
        "pipe_blocked_reader",
        "a child blocked in read of a pipe gets what is written later",
        pipe_blocked_reader,
    ),
    Program::new(
        "pipe_blocked_writer",
        "a child blocked in write of a full pipe writes on",
        pipe_blocked_writer,
    ),
    Program::new("fifo", "a FIFO with data in it: name, flags and data", fifo),
    Program::new(
        "fifo_read_end",
        "a FIFO open for reading only takes a writer later",
        fifo_read_end,
    ),
    Program::new(
        "fifo_both_ends",
        "a FIFO opened O_RDWR keeps its data",
        fifo_both_ends,
    ),
    Program::new(
        "many_pipes",
        "200 pipes, each with its own data",
        many_pipes,
    ),
];

fn pipe_data(cx: &Cx) {
    let (r, w) = os::pipe(0);
    let data = os::bytes(3, 10_000);
    os::write(&w, &data[..1]).unwrap();
    os::write(&w, &data[1..5000]).unwrap();
    os::write(&w, &data[5000..]).unwrap();
    cx.ready(|| os::read_vec(&r, 1));
    let now = drain(&r);
    cx.check(now == data, || {
        format!(
            "{} bytes that differ from the {} written",
            now.len(),
            data.len()
        )
    });
    os::write(&w, b"more").unwrap();
    cx.same(
        "read after the check",
        os::read_vec(&r, 99).unwrap(),
        b"more".to_vec(),
    );
}

/// All that is in the pipe now.
fn drain(r: &OwnedFd) -> Vec<u8> {
    let mut all = Vec::new();
    while os::polled(r, libc::POLLIN) & libc::POLLIN != 0 {
        let part = os::read_vec(r, 100_000).unwrap();
        if part.is_empty() {
            break;
        }
        all.extend(part);
    }
    all
}

fn pipe_empty(cx: &Cx) {
    let (r, w) = os::pipe(0);
    cx.ready(|| os::write(&w, b"x"));
    cx.same("bytes in it", drain(&r), Vec::new());
    os::write(&w, b"later").unwrap();
    cx.same("read", os::read_vec(&r, 99).unwrap(), b"later".to_vec());
}

fn pipe_full(cx: &Cx) {
    let (r, w) = os::pipe(libc::O_NONBLOCK);
    let mut written = Vec::new();
    for i in 0.. {
        let part = os::bytes(i, 4096);
        match os::write(&w, &part) {
            Ok(n) => written.extend(&part[..n]),
            Err(_) => break,
        }
    }
    let size = os::fcntl(&r, libc::F_GETPIPE_SZ, 0).unwrap();
    cx.ready(|| os::read_vec(&r, 4096));
    cx.same("size", os::fcntl(&r, libc::F_GETPIPE_SZ, 0).unwrap(), size);
    cx.same(
        "errno of a write to the full pipe",
        errno(&os::write(&w, b"x")),
        libc::EAGAIN,
    );
    let now = drain(&r);
    cx.check(now == written, || {
        format!(
            "{} bytes that differ from the {} written",
            now.len(),
            written.len()
        )
    });
}

fn pipe_size(cx: &Cx) {
    let sizes = [4096, 16384, 262_144, 1 << 20];
    let pipes: Vec<_> = sizes.iter().map(|_| os::pipe(libc::O_NONBLOCK)).collect();
    for ((r, w), size) in pipes.iter().zip(sizes) {
        os::fcntl(r, libc::F_SETPIPE_SZ, size).unwrap();
        os::write(w, &os::bytes(size as u64, size - 100)).unwrap();
    }
    cx.ready(|| os::fcntl(&pipes[0].0, libc::F_SETPIPE_SZ, 8192));
    for ((r, _), size) in pipes.iter().zip(sizes) {
        cx.same(
            "size",
            os::fcntl(r, libc::F_GETPIPE_SZ, 0).unwrap() as usize,
            size,
        );
        let data = drain(r);
        cx.check(data == os::bytes(size as u64, size - 100), || {
            format!("the data of the pipe of {size} differs")
        });
    }
}

fn pipe_packets(cx: &Cx) {
    let (r, w) = os::pipe(libc::O_DIRECT | libc::O_NONBLOCK);
    let sizes = [1, 7, 4096, 100, 2048];
    for size in sizes {
        os::write(&w, &os::bytes(size as u64, size)).unwrap();
    }
    cx.ready(|| os::write(&w, b"x"));
    cx.check(os::flags(&w) & libc::O_DIRECT != 0, || {
        "the writing end lost O_DIRECT".to_owned()
    });
    for size in sizes {
        let packet = os::read_vec(&r, 65536).unwrap_or_default();
        cx.check(packet == os::bytes(size as u64, size), || {
            format!("a packet of {size} came as {}", packet.len())
        });
    }
    cx.same(
        "errno after the last packet",
        errno(&os::read_vec(&r, 10)),
        libc::EAGAIN,
    );
    os::write(&w, b"one").unwrap();
    os::write(&w, b"two").unwrap();
    cx.same(
        "a packet written later",
        os::read_vec(&r, 99).unwrap(),
        b"one".to_vec(),
    );
}

fn pipe_flags(cx: &Cx) {
    let (r, w) = os::pipe(libc::O_CLOEXEC);
    let (r2, w2) = os::pipe(0);
    os::fcntl(&r, libc::F_SETFL, libc::O_NONBLOCK as usize).unwrap();
    os::fcntl(
        &w2,
        libc::F_SETFL,
        (libc::O_NONBLOCK | libc::O_ASYNC) as usize,
    )
    .unwrap();
    os::fcntl(&w2, libc::F_SETFD, libc::FD_CLOEXEC as usize).unwrap();
    let all = [&r, &w, &r2, &w2];
    let was = all.map(|fd| (os::flags(fd), os::cloexec(fd)));
    cx.ready(|| os::fcntl(&w2, libc::F_SETFL, 0));
    cx.same(
        "flags and close-on-exec",
        all.map(|fd| (os::flags(fd), os::cloexec(fd))),
        was,
    );
    cx.same(
        "errno of a read that would block",
        errno(&os::read_vec(&r, 1)),
        libc::EAGAIN,
    );
}

fn pipe_no_writer(cx: &Cx) {
    let (r, w) = os::pipe(libc::O_NONBLOCK);
    os::write(&w, b"last words").unwrap();
    drop(w);
    let (r2, _) = os::pipe(libc::O_NONBLOCK);
    cx.ready(|| os::read_vec(&r, 1));
    cx.same(
        "data",
        os::read_vec(&r, 99).unwrap(),
        b"last words".to_vec(),
    );
    cx.same("end of file", os::read_vec(&r, 99).ok(), Some(Vec::new()));
    cx.same(
        "end of file of the empty one",
        os::read_vec(&r2, 99).ok(),
        Some(Vec::new()),
    );
}

fn pipe_no_reader(cx: &Cx) {
    let (r, w) = os::pipe(0);
    // Spoilt: the reader stays.
    let spare = cx.spoiling().then_some(r);
    cx.ready(|| {});
    // The Rust runtime ignores SIGPIPE.
    cx.same("errno", errno(&os::write(&w, b"x")), libc::EPIPE);
    cx.check(os::polled(&w, libc::POLLOUT) & libc::POLLERR != 0, || {
        "no POLLERR".to_owned()
    });
    drop(spare);
}

fn pipe_across(cx: &Cx) {
    let (r, w) = os::pipe(0);
    let (back_r, back_w) = os::pipe(0);
    let data = os::bytes(9, 3000);
    let child = cx.child("reader", |cx| {
        os::syscall(libc::SYS_close, [os::raw(&w), 0, 0, 0, 0, 0]).unwrap();
        cx.ready_unspoilt();
        let mut got = Vec::new();
        loop {
            let part = os::read_vec(&r, 1000).unwrap();
            if part.is_empty() {
                break;
            }
            got.extend(part);
        }
        let end = [&data[..], b"after"].concat();
        cx.check(got == end, || {
            format!("got {} bytes, not the {} sent", got.len(), end.len())
        });
        os::write(&back_w, b"thanks").unwrap();
    });
    drop((r, back_w));
    os::write(&w, &data).unwrap();
    cx.ready(|| os::write(&w, b"x"));
    os::write(&w, b"after").unwrap();
    drop(w);
    cx.same(
        "the answer",
        os::read_vec(&back_r, 99).unwrap(),
        b"thanks".to_vec(),
    );
    cx.join("reader", child);
    cx.same(
        "end of file",
        os::read_vec(&back_r, 99).unwrap(),
        Vec::new(),
    );
}

fn pipe_reopened(cx: &Cx) {
    let (r, w) = os::pipe(0);
    let again = os::open(
        format!("/proc/self/fd/{}", w.as_raw_fd()).as_ref(),
        libc::O_WRONLY | libc::O_NONBLOCK,
    )
    .unwrap();
    os::write(&again, b"by the second").unwrap();
    drop(w);
    cx.ready(|| os::read_vec(&r, 1));
    cx.same(
        "flags",
        os::flags(&again) & libc::O_NONBLOCK,
        libc::O_NONBLOCK,
    );
    cx.same("flags of the reader", os::flags(&r) & libc::O_NONBLOCK, 0);
    cx.same(
        "data",
        os::read_vec(&r, 99).unwrap(),
        b"by the second".to_vec(),
    );
    drop(again);
    cx.same("end of file", os::read_vec(&r, 99).unwrap(), Vec::new());
}

fn pipe_blocked_reader(cx: &Cx) {
    let (r, w) = os::pipe(0);
    let child = cx.child_unready("reader", |cx| {
        cx.say_ready();
        cx.same(
            "what the blocked read gave",
            os::read_vec(&r, 99).unwrap(),
            b"at last".to_vec(),
        );
    });
    cx.await_ready("reader");
    cx.until(|| os::state_of(child) == 'S');
    cx.ready_unspoilt();
    cx.until(|| os::state_of(child) == 'S');
    cx.same("the reader", os::state_of(child), 'S');
    os::write(
        &w,
        if cx.spoiling() {
            b"spoilt!"
        } else {
            b"at last"
        },
    )
    .unwrap();
    cx.join("reader", child);
}

fn pipe_blocked_writer(cx: &Cx) {
    let (r, w) = os::pipe(0);
    let data = os::bytes(4, 200_000);
    let child = cx.child_unready("writer", |cx| {
        cx.say_ready();
        // A write that was interrupted after a part tells how much, as write(2) says.
        let mut rest = &data[..];
        while !rest.is_empty() {
            rest = &rest[os::write(&w, rest).unwrap()..];
        }
    });
    cx.await_ready("writer");
    cx.until(|| os::state_of(child) == 'S');
    cx.ready(|| os::read_vec(&r, 1));
    drop(w);
    let mut got = Vec::new();
    loop {
        let part = os::read_vec(&r, 50_000).unwrap();
        if part.is_empty() {
            break;
        }
        got.extend(part);
    }
    cx.check(got == data, || {
        format!(
            "got {} bytes, or others than the {} written",
            got.len(),
            data.len()
        )
    });
    cx.join("writer", child);
}

fn make_fifo(cx: &Cx, name: &str) -> std::path::PathBuf {
    let path = cx.path(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path
}

fn fifo(cx: &Cx) {
    let path = make_fifo(cx, "fifo");
    let r = os::open(&path, libc::O_RDONLY | libc::O_NONBLOCK).unwrap();
    let w = os::open(&path, libc::O_WRONLY).unwrap();
    os::fcntl(&r, libc::F_SETFL, 0).unwrap();
    let data = os::bytes(5, 9000);
    os::write(&w, &data).unwrap();
    let was = (os::flags(&r), os::flags(&w));
    cx.ready(|| os::read_vec(&r, 1));
    cx.same("flags", (os::flags(&r), os::flags(&w)), was);
    let link = std::fs::read_link(format!("/proc/self/fd/{}", r.as_raw_fd())).unwrap();
    cx.same("name", link, path.clone());
    let got = drain(&r);
    cx.check(got == data, || {
        format!("got {} bytes, not the {} written", got.len(), data.len())
    });
    let other = os::open(&path, libc::O_WRONLY).unwrap();
    os::write(&other, b"by name").unwrap();
    cx.same(
        "by a new writer",
        os::read_vec(&r, 99).unwrap(),
        b"by name".to_vec(),
    );
}

fn fifo_read_end(cx: &Cx) {
    let path = make_fifo(cx, "fifo");
    let r = os::open(&path, libc::O_RDONLY | libc::O_NONBLOCK).unwrap();
    cx.ready(|| std::fs::rename(&path, cx.path("elsewhere")));
    cx.same(
        "read without a writer",
        os::read_vec(&r, 9).ok(),
        Some(Vec::new()),
    );
    match os::open(&path, libc::O_WRONLY | libc::O_NONBLOCK) {
        Ok(w) => {
            os::write(&w, b"hello").unwrap();
            cx.same(
                "from a new writer",
                os::read_vec(&r, 99).unwrap(),
                b"hello".to_vec(),
            );
        }
        Err(e) => cx.fault(format!("no reader for a new writer: {e}")),
    }
}

fn fifo_both_ends(cx: &Cx) {
    let path = make_fifo(cx, "fifo");
    let both = os::open(&path, libc::O_RDWR | libc::O_NONBLOCK).unwrap();
    os::write(&both, b"to myself").unwrap();
    cx.ready(|| os::read_vec(&both, 1));
    cx.same(
        "access mode",
        os::flags(&both) & libc::O_ACCMODE,
        libc::O_RDWR,
    );
    cx.same(
        "data",
        os::read_vec(&both, 99).unwrap_or_default(),
        b"to myself".to_vec(),
    );
    cx.same(
        "errno when empty",
        errno(&os::read_vec(&both, 1)),
        libc::EAGAIN,
    );
}

fn many_pipes(cx: &Cx) {
    let pipes: Vec<_> = (0..200).map(|_| os::pipe(libc::O_NONBLOCK)).collect();
    for (i, (_, w)) in (0u64..).zip(&pipes) {
        os::write(w, &i.to_le_bytes()).unwrap();
    }
    cx.ready(|| os::read_vec(&pipes[77].0, 1));
    for (i, (r, _)) in (0u64..).zip(&pipes) {
        cx.same(
            "data of a pipe",
            os::read_vec(r, 99).unwrap_or_default(),
            i.to_le_bytes().to_vec(),
        );
    }
}
