//! Programs started from a terminal, by a session leader outside the tree (`--shell-job`).

use super::os::{self};
use super::{Cx, Program};
use std::os::fd::{AsRawFd, OwnedFd};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "stdio",
        "standard descriptors on the terminal, in a session led from outside",
        stdio,
    )
    .terminal(),
    Program::new(
        "group",
        "a process group of its own in the session of the terminal",
        group,
    )
    .terminal(),
    Program::new(
        "reader",
        "a child blocked in a read of the terminal",
        reader,
    )
    .terminal(),
    Program::new("dev_tty", "/dev/tty opened by its name", dev_tty)
        .terminal()
        .carried_or_refused("tty"),
    Program::new(
        "no_terminal",
        "a session led from outside, nothing open on the terminal",
        no_terminal,
    )
    .terminal(),
    Program::new(
        "without_flag",
        "without --shell-job the session leader outside is a reason to refuse",
        stdio,
    )
    .terminal_without_flag()
    .refused("shell-job"),
];

fn terminal() -> [OwnedFd; 3] {
    use std::os::fd::AsFd;
    [
        std::io::stdin().as_fd(),
        std::io::stdout().as_fd(),
        std::io::stderr().as_fd(),
    ]
    .map(|fd| fd.try_clone_to_owned().unwrap())
}

fn settings(fd: &impl AsRawFd) -> String {
    // SAFETY: termios is plain data, written by the call.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        let got = libc::tcgetattr(fd.as_raw_fd(), &mut settings);
        format!(
            "{got} {:o} {:o} {:?}",
            settings.c_iflag, settings.c_lflag, settings.c_cc
        )
    }
}

fn name(fd: &impl AsRawFd) -> std::path::PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

fn foreground(fd: &impl AsRawFd) -> i32 {
    // SAFETY: a call with a number.
    unsafe { libc::tcgetpgrp(fd.as_raw_fd()) }
}

fn stdio(cx: &Cx) {
    let fds = terminal();
    let state = || {
        let ids = (
            os::getpgid(0),
            os::getsid(0),
            foreground(&fds[0]),
            os::stat_field(os::getpid(), 7),
        );
        (
            fds.each_ref()
                .map(|fd| (name(fd), os::flags(fd), settings(fd))),
            ids,
        )
    };
    let was = state();
    let shared = os::same_file(os::getpid(), 0, os::getpid(), 1);
    let spoilt = std::cell::Cell::new(5);
    cx.ready(|| spoilt.set(4));
    cx.same("names, flags, settings, ids", state(), was);
    cx.same(
        "whether input and output are one open file",
        os::same_file(os::getpid(), 0, os::getpid(), 1),
        shared,
    );
    cx.same(
        "a write",
        os::write(&fds[1], b"out\r\n").ok(),
        Some(spoilt.get()),
    );
}

fn group(cx: &Cx) {
    let fds = terminal();
    let child = cx.child("child", |cx| {
        os::setpgid(0, 0);
        let was = (os::getpgid(0), os::getsid(0));
        cx.ready(|| os::setpgid(0, os::getpgid(os::getppid())));
        cx.same("group and session", (os::getpgid(0), os::getsid(0)), was);
    });
    let was = (os::getpgid(0), os::getsid(0), foreground(&fds[0]));
    cx.ready_unspoilt();
    cx.same(
        "group, session, foreground group",
        (os::getpgid(0), os::getsid(0), foreground(&fds[0])),
        was,
    );
    cx.join("child", child);
}

fn reader(cx: &Cx) {
    let fds = terminal();
    let child = cx.child_unready("child", |cx| {
        cx.say_ready();
        cx.same(
            "what the blocked read gave",
            os::read_vec(&fds[0], 99).ok(),
            Some(b"typed\n".to_vec()),
        );
    });
    cx.await_ready("child");
    cx.until(|| os::state_of(child) == 'S');
    cx.ready_unspoilt();
    // As if typed: needs CAP_SYS_ADMIN, or the controlling terminal.
    let text: &[u8] = if cx.spoiling() {
        b"spoilt\n"
    } else {
        b"typed\n"
    };
    for byte in text {
        os::syscall(
            libc::SYS_ioctl,
            [
                os::raw(&fds[0]),
                libc::TIOCSTI as usize,
                os::at(byte),
                0,
                0,
                0,
            ],
        )
        .unwrap();
    }
    cx.join("child", child);
}

fn dev_tty(cx: &Cx) {
    let tty = os::open("/dev/tty".as_ref(), libc::O_RDWR).unwrap();
    let was = (name(&tty), foreground(&tty));
    let spoilt = std::cell::Cell::new(2);
    cx.ready(|| spoilt.set(1));
    cx.same(
        "name, foreground group",
        (name(&tty), foreground(&tty)),
        was,
    );
    cx.same("a write", os::write(&tty, b"\r\n").ok(), Some(spoilt.get()));
}

fn no_terminal(cx: &Cx) {
    let null = os::open("/dev/null".as_ref(), libc::O_RDWR).unwrap();
    (0..3).for_each(|n| os::dup_to(null.as_raw_fd(), n));
    let ids = || {
        (
            os::getpgid(0),
            os::getsid(0),
            os::stat_field(os::getpid(), 7),
        )
    };
    let was = ids();
    cx.ready(|| os::setpgid(0, 0));
    cx.same("group, session, terminal", ids(), was);
}
