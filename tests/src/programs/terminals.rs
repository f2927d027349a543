//! Pseudo-terminals with both sides in the tree, sessions and their controlling terminals.

use super::os::{self};
use super::{Cx, Need, Program};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new("pair", "a master and its slave, both directions", pair),
    Program::new(
        "settings",
        "termios with odd speeds and characters, window size",
        settings,
    ),
    Program::new(
        "input_lines",
        "lines not read yet: by newline, end of file, another character, one still typed",
        input_lines,
    ),
    Program::new("input_typed", "half a line, typed on", input_typed),
    Program::new("input_raw", "bytes not read yet, no lines", input_raw),
    Program::new(
        "input_full",
        "more input than the line discipline holds",
        input_full,
    ),
    Program::new("output", "output not read yet", output),
    Program::new(
        "output_full",
        "more output than the line discipline holds",
        output_full,
    ),
    Program::new("packet", "packet mode", packet),
    Program::new(
        "packet_pending",
        "packet mode with a change not read yet",
        packet_pending,
    )
    .refused("packet mode"),
    Program::new("exclusive", "TIOCEXCL, a locked slave", exclusive),
    Program::new("never_opened", "a slave never opened", never_opened),
    Program::new(
        "path_only",
        "a slave never opened but by its path (O_PATH)",
        path_only,
    ),
    Program::new(
        "slave_closed",
        "a slave closed by all, with input in it",
        slave_closed,
    ),
    Program::new("hung", "slaves whose master is closed", hung),
    Program::new("hung_up", "hung up, opened again", hung_up),
    Program::new(
        "several",
        "several openings of one slave, shared and not",
        several,
    ),
    Program::new("numbers", "numbers with gaps between them", numbers),
    Program::new("node", "owner and mode of /dev/pts/N", node),
    Program::new(
        "stopped_call",
        "output stopped by tcflow(3), with a full queue",
        stopped_call,
    ),
    Program::new("stopped_char", "output stopped by ^S", stopped_char),
    Program::new(
        "controlling",
        "a session on a terminal of the tree: /dev/tty, ^C, children",
        controlling,
    ),
    Program::new("foreground", "foreground and background groups", foreground),
    Program::new(
        "foreground_ended",
        "a foreground group of which nobody is left",
        foreground_ended,
    ),
    Program::new(
        "given_up",
        "processes without a terminal in a session with one",
        given_up,
    ),
    Program::new(
        "blocked",
        "a reader and a writer blocked in the terminal",
        blocked,
    ),
    Program::new(
        "resize",
        "SIGWINCH to the foreground after a new size",
        resize,
    ),
    Program::new(
        "locked_settings",
        "settings locked by TIOCSLCKTRMIOS",
        locked_settings,
    )
    .refused("locked settings"),
    Program::new("console", "a virtual console", console)
        .refused("terminal")
        .needs(&[CONSOLE]),
    Program::new(
        "discipline",
        "another line discipline than the usual one",
        discipline,
    )
    .refused("line discipline 27"),
    Program::new(
        "former_tty",
        "/dev/tty of a session that has given its terminal up",
        former_tty,
    )
    .refused("which is not the terminal of its session any more"),
    Program::new(
        "waits_refused",
        "what waits in a terminal, where another one has to be refused",
        waits_refused,
    )
    .refused("locked settings"),
];

const TIOCGPTN: usize = 0x8004_5430;
const TIOCSPTLCK: usize = 0x4004_5431;
const TIOCGPTLCK: usize = 0x8004_5439;
const TIOCPKT: usize = 0x5420;
const TIOCGPKT: usize = 0x8004_5438;
const TIOCEXCL: usize = 0x540c;
const TIOCGEXCL: usize = 0x8004_5440;
const TCGETS2: usize = 0x802c_542a;
const TCSETS2: usize = 0x402c_542b;
const TIOCSLCKTRMIOS: usize = 0x5457;
const TIOCSETD: usize = 0x5423;
const TIOCGETD: usize = 0x5424;
const FIONREAD: usize = 0x541b;

fn ioctl(fd: &impl AsRawFd, request: usize, argument: usize) -> os::Result<i64> {
    os::syscall(libc::SYS_ioctl, [os::raw(fd), request, argument, 0, 0, 0])
}

fn get(fd: &impl AsRawFd, request: usize) -> i32 {
    let mut value = 0i32;
    match ioctl(fd, request, os::at_mut(&mut value)) {
        Ok(_) => value,
        Err(e) => -e.raw_os_error().unwrap_or(1),
    }
}

fn set(fd: &impl AsRawFd, request: usize, value: i32) {
    ioctl(fd, request, os::at(&value)).unwrap();
}

fn number(master: &impl AsRawFd) -> i32 {
    get(master, TIOCGPTN)
}

fn path(master: &impl AsRawFd) -> std::path::PathBuf {
    format!("/dev/pts/{}", number(master)).into()
}

fn master() -> OwnedFd {
    os::open("/dev/ptmx".as_ref(), libc::O_RDWR | libc::O_NOCTTY).unwrap()
}

fn slave(master: &OwnedFd, flags: i32) -> OwnedFd {
    set(master, TIOCSPTLCK, 0);
    os::open(&path(master), flags | libc::O_NOCTTY).unwrap()
}

fn open_pty() -> (OwnedFd, OwnedFd) {
    let master = master();
    let slave = slave(&master, libc::O_RDWR);
    (master, slave)
}

/// struct termios2: four modes, the discipline and 19 characters, two speeds.
type Modes = [u32; 11];

fn modes(fd: &impl AsRawFd) -> Modes {
    let mut modes = [0u32; 11];
    ioctl(fd, TCGETS2, os::at_mut(&mut modes)).unwrap();
    modes
}

fn set_modes(fd: &impl AsRawFd, modes: &Modes) {
    ioctl(fd, TCSETS2, os::at(modes)).unwrap();
}

/// No lines, no echo, no changes.
fn make_raw(fd: &impl AsRawFd) {
    let mut raw = modes(fd);
    (raw[0], raw[1], raw[3]) = (0, 0, 0);
    set_modes(fd, &raw);
}

fn no_echo(fd: &impl AsRawFd) {
    let mut quiet = modes(fd);
    quiet[3] &= !(libc::ECHO | libc::ECHOCTL);
    set_modes(fd, &quiet);
}

fn size(fd: &impl AsRawFd) -> [u16; 4] {
    let mut size = [0u16; 4];
    ioctl(fd, libc::TIOCGWINSZ as usize, os::at_mut(&mut size)).unwrap();
    size
}

fn resize_to(fd: &impl AsRawFd, size: [u16; 4]) {
    ioctl(fd, libc::TIOCSWINSZ as usize, os::at(&size)).unwrap();
}

fn link(fd: &impl AsRawFd) -> std::path::PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

fn not_blocking(fd: &impl AsRawFd) {
    os::fcntl(
        fd,
        libc::F_SETFL,
        (os::flags(fd) | libc::O_NONBLOCK) as usize,
    )
    .unwrap();
}

/// What there is to be read, the descriptor not blocking; waits until it is as long as that.
fn read_all(cx: &Cx, fd: &impl AsRawFd, len: usize) -> Vec<u8> {
    let mut all = Vec::new();
    cx.until(|| {
        while let Ok(some) = os::read_vec(fd, 65536) {
            if some.is_empty() {
                break;
            }
            all.extend(some);
        }
        all.len() >= len
    });
    all
}

/// Writes until no more goes in, the descriptor not blocking, and nothing moves on either.
fn fill(fd: &impl AsRawFd, other: &impl AsRawFd) -> Vec<u8> {
    let mut all = Vec::new();
    let mut idle = 0;
    while idle < 50 {
        let next = os::bytes(all.len() as u64 + 1, 512);
        let next: Vec<u8> = next.iter().map(|b| b'a' + b % 26).collect();
        match os::write(fd, &next) {
            Ok(n) => {
                all.extend_from_slice(&next[..n]);
                idle = 0;
            }
            Err(_) => {
                os::polled(other, libc::POLLIN);
                os::sleep_ms(1);
                idle += 1;
            }
        }
    }
    all
}

fn pair(cx: &Cx) {
    let (master, slave) = open_pty();
    not_blocking(&master);
    let state = || {
        let of = |fd: &OwnedFd| (link(fd), os::flags(fd), os::cloexec(fd));
        (
            of(&master),
            of(&slave),
            number(&master),
            modes(&slave),
            modes(&master),
        )
    };
    let was = state();
    cx.ready(|| os::dup_to(master.as_raw_fd(), slave.as_raw_fd()));
    cx.same("names, flags, number, settings", state(), was);
    os::write(&master, b"typed\n").unwrap();
    cx.same(
        "what was typed",
        os::read_vec(&slave, 99).ok(),
        Some(b"typed\n".to_vec()),
    );
    cx.same("its echo", read_all(cx, &master, 7), b"typed\r\n".to_vec());
    os::write(&slave, b"told\n").unwrap();
    cx.same(
        "what was told",
        read_all(cx, &master, 6),
        b"told\r\n".to_vec(),
    );
}

fn settings(cx: &Cx) {
    let (master, slave) = open_pty();
    let mut odd = modes(&slave);
    odd[0] = libc::IGNPAR | libc::IXON | libc::IUTF8 | libc::PARMRK;
    odd[1] = libc::OPOST | libc::OCRNL | libc::ONLRET;
    // BOTHER: speeds that have no name.
    odd[2] = (odd[2] & !0o010017) | 0o010000 | libc::CSTOPB | libc::HUPCL;
    odd[3] = libc::ICANON | libc::ECHO | libc::NOFLSH | libc::TOSTOP;
    odd[4] = 0x1211_1000;
    odd[5] = 0x0102_0304;
    odd[9] = 12_345;
    odd[10] = 12_345;
    set_modes(&slave, &odd);
    resize_to(&master, [33, 132, 640, 480]);
    let state = || (modes(&slave), size(&slave), size(&master));
    let was = state();
    cx.ready(|| resize_to(&slave, [33, 132, 640, 481]));
    cx.same("settings and sizes", state(), was);
}

fn input_lines(cx: &Cx) {
    let (master, slave) = open_pty();
    let mut with_eol = modes(&slave);
    with_eol[3] &= !libc::ECHO;
    // c_line and c_cc are from the fifth word on.
    let mut bytes: Vec<u8> = with_eol[4..9]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    bytes[1 + libc::VEOL] = b'|';
    for (i, word) in bytes.chunks_exact(4).enumerate() {
        with_eol[4 + i] = u32::from_le_bytes(word.try_into().unwrap());
    }
    set_modes(&slave, &with_eol);
    // \x16 takes the next as it is.
    os::write(
        &master,
        b"one\ntwo\x04\x04piped|a\x16\x03\x16\x04b\nha\x16|lf|gone\x15kept",
    )
    .unwrap();
    let waits = || {
        os::polled(&slave, libc::POLLIN);
        get(&slave, FIONREAD)
    };
    cx.until(|| waits() == 4 + 3 + 6 + 5 + 6);
    let was = (waits(), modes(&slave));
    not_blocking(&slave);
    cx.ready(|| os::read_vec(&slave, 2));
    cx.same("what waits, settings", (waits(), modes(&slave)), was);
    let mut lines = Vec::new();
    while let Ok(line) = os::read_vec(&slave, 4096) {
        lines.push(String::from_utf8(line).unwrap());
    }
    let wanted = ["one\n", "two", "", "piped|", "a\x03\x04b\n", "ha|", "lf|"];
    // A bar taken as it is may end its line where it was not to.
    let joined = ["one\n", "two", "", "piped|", "a\x03\x04b\n", "ha|lf|"];
    cx.check(lines == wanted || lines == joined, || {
        format!("lines: {lines:?}")
    });
    os::write(&master, b"!\n").unwrap();
    cx.same(
        "the line typed on",
        read_all(cx, &slave, 6),
        b"kept!\n".to_vec(),
    );
}

fn input_typed(cx: &Cx) {
    let (master, slave) = open_pty();
    os::write(&master, b"hal").unwrap();
    not_blocking(&master);
    cx.same("echo", read_all(cx, &master, 3), b"hal".to_vec());
    let was = (modes(&slave), get(&slave, FIONREAD));
    cx.ready(|| ioctl(&slave, libc::TCFLSH as usize, libc::TCIFLUSH as usize));
    cx.same("settings", (modes(&slave), get(&slave, FIONREAD)), was);
    cx.same("what can be read", os::polled(&slave, libc::POLLIN), 0);
    os::write(&master, b"x\x7ff\n").unwrap();
    not_blocking(&slave);
    cx.same("the line", read_all(cx, &slave, 5), b"half\n".to_vec());
    cx.same(
        "its echo",
        read_all(cx, &master, 7),
        b"x\x08 \x08f\r\n".to_vec(),
    );
}

fn input_raw(cx: &Cx) {
    let (master, slave) = open_pty();
    make_raw(&slave);
    let mut odd = modes(&slave);
    // VMIN of 200: poll(2) says nothing before.
    let mut bytes: Vec<u8> = odd[4..9].iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes[1 + libc::VMIN] = 200;
    for (i, word) in bytes.chunks_exact(4).enumerate() {
        odd[4 + i] = u32::from_le_bytes(word.try_into().unwrap());
    }
    set_modes(&slave, &odd);
    let sent: Vec<u8> = (0..=99).chain([0, 3, 4, 13, 10, 17, 19, 255]).collect();
    os::write(&master, &sent).unwrap();
    cx.until(|| get(&slave, FIONREAD) == sent.len() as i32);
    let was = modes(&slave);
    not_blocking(&slave);
    cx.ready(|| os::read_vec(&slave, 1));
    cx.same("settings", modes(&slave), was);
    cx.same("what waited", read_all(cx, &slave, sent.len()), sent);
}

fn input_full(cx: &Cx) {
    let (master, slave) = open_pty();
    make_raw(&slave);
    not_blocking(&master);
    let sent = fill(&master, &slave);
    cx.check(sent.len() > 8000, || format!("only {} went in", sent.len()));
    not_blocking(&slave);
    cx.ready(|| os::read_vec(&slave, 1));
    cx.same("what waited", read_all(cx, &slave, sent.len()), sent);
}

fn output(cx: &Cx) {
    let (master, slave) = open_pty();
    os::write(&slave, b"a line\nand\x03more\x13").unwrap();
    cx.until(|| get(&master, FIONREAD) == 17);
    let was = (
        get(&master, FIONREAD),
        modes(&slave),
        os::polled(&slave, libc::POLLOUT),
    );
    not_blocking(&master);
    cx.ready(|| os::read_vec(&master, 3));
    let now = (
        get(&master, FIONREAD),
        modes(&slave),
        os::polled(&slave, libc::POLLOUT),
    );
    cx.same("how much waits, settings", now, was);
    cx.same(
        "output",
        read_all(cx, &master, 17),
        b"a line\r\nand\x03more\x13".to_vec(),
    );
}

fn output_full(cx: &Cx) {
    let (master, slave) = open_pty();
    not_blocking(&slave);
    let sent = fill(&slave, &master);
    cx.check(sent.len() > 8000, || format!("only {} went in", sent.len()));
    not_blocking(&master);
    cx.ready(|| os::read_vec(&master, 1));
    cx.same("output", read_all(cx, &master, sent.len()), sent);
}

fn packet(cx: &Cx) {
    let (master, slave) = open_pty();
    set(&master, TIOCPKT, 1);
    os::write(&slave, b"data").unwrap();
    not_blocking(&master);
    cx.until(|| os::polled(&master, libc::POLLIN) != 0);
    cx.ready(|| set(&master, TIOCPKT, 0));
    cx.same("packet mode", get(&master, TIOCGPKT), 1);
    cx.same("a packet", read_all(cx, &master, 5), b"\0data".to_vec());
    ioctl(&slave, libc::TCFLSH as usize, libc::TCOFLUSH as usize).unwrap();
    cx.same("a change", read_all(cx, &master, 1), vec![2]);
}

fn packet_pending(cx: &Cx) {
    let (master, slave) = open_pty();
    set(&master, TIOCPKT, 1);
    ioctl(&slave, libc::TCFLSH as usize, libc::TCIFLUSH as usize).unwrap();
    not_blocking(&master);
    cx.ready(|| os::read_vec(&master, 9));
    cx.same("the change", os::read_vec(&master, 9).ok(), Some(vec![1]));
}

fn exclusive(cx: &Cx) {
    let (one, first) = open_pty();
    ioctl(&first, TIOCEXCL, 0).unwrap();
    let (two, second) = open_pty();
    set(&two, TIOCSPTLCK, 1);
    let state = || {
        let of = |fd: &OwnedFd| (get(fd, TIOCGEXCL), get(fd, TIOCGPTLCK));
        let open = os::open(&path(&two), libc::O_RDWR | libc::O_NOCTTY);
        (
            of(&one),
            of(&two),
            get(&first, TIOCGEXCL),
            get(&second, TIOCGEXCL),
            os::errno(&open),
        )
    };
    let was = state();
    cx.same("an open of the locked one", was.4, libc::EIO);
    cx.ready(|| set(&two, TIOCSPTLCK, 0));
    cx.same("exclusive, locked", state(), was);
}

fn never_opened(cx: &Cx) {
    let master = master();
    let locked = get(&master, TIOCGPTLCK);
    let state = || {
        let events = os::polled(&master, libc::POLLIN | libc::POLLOUT | libc::POLLHUP);
        (
            events,
            get(&master, TIOCGPTLCK),
            number(&master),
            modes(&master),
        )
    };
    let was = state();
    cx.same("locked", locked, 1);
    cx.ready(|| drop(slave(&master, libc::O_RDWR)));
    cx.same("events, lock, number, settings", state(), was);
    let slave = slave(&master, libc::O_RDWR);
    os::write(&master, b"first\n").unwrap();
    cx.same(
        "what was typed",
        os::read_vec(&slave, 99).ok(),
        Some(b"first\n".to_vec()),
    );
}

fn path_only(cx: &Cx) {
    let master = master();
    let named = os::open(&path(&master), libc::O_PATH).unwrap();
    let state = || {
        let events = os::polled(&master, libc::POLLIN | libc::POLLOUT | libc::POLLHUP);
        (events, get(&master, TIOCGPTLCK), link(&named))
    };
    let was = state();
    cx.ready(|| drop(slave(&master, libc::O_RDWR)));
    cx.same("events, lock, name", state(), was);
}

fn slave_closed(cx: &Cx) {
    let (master, first) = open_pty();
    no_echo(&first);
    os::write(&master, b"unread\n").unwrap();
    cx.until(|| os::polled(&first, libc::POLLIN) != 0);
    drop(first);
    let state = || {
        let events = os::polled(&master, libc::POLLIN | libc::POLLOUT | libc::POLLHUP);
        (events, os::errno(&os::read_vec(&master, 9)), modes(&master))
    };
    let was = state();
    cx.same("a read without a slave", was.1, libc::EIO);
    let again = std::cell::RefCell::new(None);
    cx.ready(|| again.replace(Some(slave(&master, libc::O_RDWR))));
    // (Spoilt, a read would wait for ever.)
    not_blocking(&master);
    cx.same("events, read, settings", state(), was);
    let slave = slave(&master, libc::O_RDWR | libc::O_NONBLOCK);
    cx.same(
        "what was not read",
        read_all(cx, &slave, 7),
        b"unread\n".to_vec(),
    );
}

fn hung(cx: &Cx) {
    let (master, slave) = open_pty();
    let other = self::slave(&master, libc::O_RDONLY | libc::O_NONBLOCK);
    drop(master);
    let state = || {
        [&slave, &other].map(|fd| {
            let events = os::polled(fd, libc::POLLIN | libc::POLLOUT | libc::POLLHUP);
            let write = os::errno(&os::write(fd, b"x"));
            (
                link(fd),
                os::flags(fd),
                events,
                os::read_vec(fd, 9).ok(),
                write,
            )
        })
    };
    let was = state();
    cx.ready(|| os::dup_to(other.as_raw_fd(), slave.as_raw_fd()));
    cx.same("names, flags, events, read, write", state(), was);
}

fn hung_up(cx: &Cx) {
    let (master, old) = open_pty();
    ioctl(&old, libc::TIOCVHANGUP as usize, 0).unwrap();
    let new = slave(&master, libc::O_RDWR | libc::O_NONBLOCK);
    let state = || {
        let of = |fd: &OwnedFd| (link(fd), os::polled(fd, libc::POLLIN | libc::POLLHUP));
        (of(&old), of(&new), of(&master))
    };
    let was = state();
    cx.ready(|| os::dup_to(new.as_raw_fd(), old.as_raw_fd()));
    cx.same("names, events", state(), was);
    os::write(&master, b"typed\n").unwrap();
    cx.same("what was typed", read_all(cx, &new, 6), b"typed\n".to_vec());
    cx.same(
        "a read of the old one",
        os::read_vec(&old, 9).ok(),
        Some(Vec::new()),
    );
}

fn several(cx: &Cx) {
    let (master, one) = open_pty();
    let two = slave(&master, libc::O_RDONLY | libc::O_NONBLOCK);
    let three = slave(&master, libc::O_WRONLY | libc::O_APPEND);
    let four = one.try_clone().unwrap();
    let me = os::getpid();
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        let same = os::same_file(os::getpid(), one.as_raw_fd(), me, one.as_raw_fd());
        cx.same("whether one is one open file", same, true);
        os::write(&three, b"c").unwrap();
    });
    let state = || {
        let of = |fd: &OwnedFd| (link(fd), os::flags(fd));
        let same = |a: &OwnedFd, b: &OwnedFd| os::same_file(me, a.as_raw_fd(), me, b.as_raw_fd());
        (
            [&one, &two, &three, &four].map(of),
            same(&one, &four),
            same(&one, &two),
        )
    };
    let was = state();
    cx.ready(|| not_blocking(&three));
    cx.same("names, flags, what is shared", state(), was);
    cx.join("child", child);
    not_blocking(&master);
    cx.same(
        "what the child told",
        read_all(cx, &master, 1),
        b"c".to_vec(),
    );
}

fn numbers(cx: &Cx) {
    let mut all: Vec<OwnedFd> = (0..8).map(|_| master()).collect();
    for gone in [6, 3, 2, 0] {
        all.remove(gone);
    }
    let state = || all.iter().map(number).collect::<Vec<_>>();
    let was = state();
    let spoilt = std::cell::Cell::new(false);
    cx.ready(|| spoilt.set(true));
    let now = if spoilt.get() {
        vec![number(&master())]
    } else {
        state()
    };
    cx.same("numbers", now, was);
}

fn node(cx: &Cx) {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let (master, slave) = open_pty();
    let path = path(&master);
    std::os::unix::fs::chown(&path, Some(65534), Some(5)).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o622)).unwrap();
    let state = || {
        let node = std::fs::metadata(&path).unwrap();
        (
            node.uid(),
            node.gid(),
            node.mode(),
            node.rdev(),
            link(&slave),
        )
    };
    let was = state();
    cx.ready(|| std::os::unix::fs::chown(&path, Some(0), None));
    cx.same("owner, group, mode", state(), was);
}

fn stopped_call(cx: &Cx) {
    let (master, slave) = open_pty();
    not_blocking(&slave);
    let sent = fill(&slave, &master);
    ioctl(&slave, libc::TCXONC as usize, libc::TCOOFF as usize).unwrap();
    not_blocking(&master);
    cx.ready(|| ioctl(&slave, libc::TCXONC as usize, libc::TCOON as usize));
    cx.same("output", read_all(cx, &master, sent.len()), sent);
    cx.same("a write", os::errno(&os::write(&slave, b"x")), libc::EAGAIN);
    // ^Q does not start what tcflow stopped.
    os::write(&master, b"\x11").unwrap();
    os::sleep_ms(5);
    cx.same(
        "a write after ^Q",
        os::errno(&os::write(&slave, b"x")),
        libc::EAGAIN,
    );
    ioctl(&slave, libc::TCXONC as usize, libc::TCOON as usize).unwrap();
    cx.same("a write then", os::write(&slave, b"x").ok(), Some(1));
}

fn stopped_char(cx: &Cx) {
    let (master, slave) = open_pty();
    not_blocking(&slave);
    os::write(&slave, b"before").unwrap();
    os::write(&master, b"\x13").unwrap();
    cx.until(|| os::polled(&slave, libc::POLLOUT) == 0);
    not_blocking(&master);
    cx.ready(|| os::write(&master, b"\x11"));
    if cx.spoiling() {
        cx.until(|| os::polled(&slave, libc::POLLOUT) != 0);
    }
    cx.same("output", read_all(cx, &master, 6), b"before".to_vec());
    cx.same("a write", os::errno(&os::write(&slave, b"x")), libc::EAGAIN);
    ioctl(&slave, libc::TCXONC as usize, libc::TCOON as usize).unwrap();
    cx.same(
        "a write after TCOON",
        os::errno(&os::write(&slave, b"x")),
        libc::EAGAIN,
    );
    os::write(&master, b"\x11").unwrap();
    cx.until(|| os::polled(&slave, libc::POLLOUT) != 0);
    cx.same("a write after ^Q", os::write(&slave, b"x").ok(), Some(1));
}

static SIGNAL: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: i32) {
    SIGNAL.store(signal, Ordering::SeqCst);
}

fn catch(signal: i32) {
    // SAFETY: the handler stores to an atomic, which is safe in a handler.
    unsafe { libc::signal(signal, note as *const () as libc::sighandler_t) };
}

fn ignore(signal: i32) {
    // SAFETY: SIG_IGN runs nothing.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

fn lead(slave: &OwnedFd) {
    os::own_session();
    ioctl(slave, libc::TIOCSCTTY as usize, 0).unwrap();
}

fn ids() -> (i32, i32, String, String) {
    let me = os::getpid();
    (
        os::getpgid(0),
        os::getsid(0),
        os::stat_field(me, 7),
        os::stat_field(me, 8),
    )
}

fn controlling(cx: &Cx) {
    let (master, slave) = open_pty();
    let child = cx.child("leader", |cx| {
        lead(&slave);
        catch(libc::SIGINT);
        let tty = os::open("/dev/tty".as_ref(), libc::O_RDWR).unwrap();
        let state = |tty: &OwnedFd| {
            (
                ids(),
                link(tty),
                os::flags(tty),
                get(tty, libc::TIOCGPGRP as usize),
            )
        };
        let grandchild = cx.child("child", |cx| {
            let was = state(&tty);
            cx.ready_unspoilt();
            cx.same("ids of a child", state(&tty), was);
            let again = os::open("/dev/tty".as_ref(), libc::O_RDWR);
            cx.check(again.is_ok(), || format!("/dev/tty: {again:?}"));
        });
        let was = state(&tty);
        cx.ready(|| ioctl(&tty, libc::TIOCNOTTY as usize, 0));
        cx.same("ids, /dev/tty", state(&tty), was);
        cx.join("child", grandchild);
        cx.same("a write", os::write(&tty, b"hello").ok(), Some(5));
        std::fs::write(cx.path("told"), "").unwrap();
        cx.check(
            cx.until(|| SIGNAL.load(Ordering::SeqCst) == libc::SIGINT),
            || "no SIGINT by ^C".into(),
        );
    });
    drop(slave);
    not_blocking(&master);
    cx.ready_unspoilt();
    if !cx.spoiling() {
        cx.await_file("told");
        cx.same("what it told", read_all(cx, &master, 5), b"hello".to_vec());
        os::write(&master, b"\x03").unwrap();
    }
    cx.join("leader", child);
}

fn foreground(cx: &Cx) {
    let (master, slave) = open_pty();
    let child = cx.child("leader", |cx| {
        lead(&slave);
        ignore(libc::SIGTTOU);
        let job = |name: &'static str, signal: bool| {
            cx.child(name, move |cx| {
                os::setpgid(0, 0);
                catch(libc::SIGINT);
                let was = ids();
                cx.ready_unspoilt();
                let now = ids();
                cx.same(
                    "group, session, terminal",
                    (now.0, now.1, &now.2),
                    (was.0, was.1, &was.2),
                );
                if signal {
                    cx.check(cx.until(|| SIGNAL.load(Ordering::SeqCst) != 0), || {
                        "no SIGINT".into()
                    });
                } else {
                    cx.await_file("result.leader.front");
                    cx.same("a signal", SIGNAL.load(Ordering::SeqCst), 0);
                }
            })
        };
        let front = job("front", true);
        let back = job("back", false);
        set(&slave, libc::TIOCSPGRP as usize, front);
        let was = (ids(), get(&slave, libc::TIOCGPGRP as usize));
        cx.ready(|| set(&slave, libc::TIOCSPGRP as usize, back));
        cx.same(
            "ids, foreground",
            (ids(), get(&slave, libc::TIOCGPGRP as usize)),
            was,
        );
        std::fs::write(cx.path("asked"), "").unwrap();
        if !cx.spoiling() {
            cx.join("front", front);
            cx.join("back", back);
        }
    });
    cx.ready_unspoilt();
    cx.await_file("asked");
    os::write(&master, b"\x03").unwrap();
    cx.join("leader", child);
}

fn foreground_ended(cx: &Cx) {
    let (_master, slave) = open_pty();
    let child = cx.child("leader", |cx| {
        lead(&slave);
        ignore(libc::SIGTTOU);
        let go = cx.path("go");
        let job = os::fork_run(|| {
            os::setpgid(0, 0);
            while !cx.asked(&go) {
                os::sleep_ms(1);
            }
            0
        });
        cx.until(|| os::getpgid(job) == job);
        set(&slave, libc::TIOCSPGRP as usize, job);
        std::fs::write(&go, "").unwrap();
        os::waitpid(job, 0).unwrap();
        let was = (ids(), get(&slave, libc::TIOCGPGRP as usize));
        cx.same("the foreground group that has ended", was.1, job);
        cx.ready(|| set(&slave, libc::TIOCSPGRP as usize, os::getpid()));
        cx.same(
            "ids, foreground",
            (ids(), get(&slave, libc::TIOCGPGRP as usize)),
            was,
        );
    });
    cx.ready_unspoilt();
    cx.join("leader", child);
}

fn given_up(cx: &Cx) {
    let (_master, slave) = open_pty();
    let child = cx.child("leader", |cx| {
        os::own_session();
        let body = |cx: &Cx| {
            let was = ids();
            cx.same("terminal", was.2.as_str(), "0");
            cx.ready(|| ());
            let spoilt = cx.spoiling().then(String::new);
            cx.same("ids", spoilt.unwrap_or(ids().2), was.2);
            let tty = os::open("/dev/tty".as_ref(), libc::O_RDWR);
            cx.same("/dev/tty", os::errno(&tty), libc::ENXIO);
        };
        let early = cx.child("early", body);
        lead(&slave);
        let gone = cx.child("gone", |cx| {
            ioctl(&slave, libc::TIOCNOTTY as usize, 0).unwrap();
            body(cx);
        });
        let was = ids();
        cx.ready_unspoilt();
        cx.same("ids of the leader", ids(), was);
        cx.join("early", early);
        cx.join("gone", gone);
    });
    cx.ready_unspoilt();
    cx.join("leader", child);
}

fn blocked(cx: &Cx) {
    let (one, reads) = open_pty();
    let (two, writes) = open_pty();
    no_echo(&reads);
    let reader = cx.child_unready("reader", |cx| {
        cx.say_ready();
        cx.same(
            "what it read",
            os::read_vec(&reads, 99).ok(),
            Some(b"line\n".to_vec()),
        );
    });
    let writer = cx.child_unready("writer", |cx| {
        make_raw(&writes);
        cx.say_ready();
        let (text, mut at) = (os::bytes(5, 40_000), 0);
        // A stop makes a write of a terminal give what it has written so far.
        while at < text.len() {
            at += os::write(&writes, &text[at..]).unwrap();
        }
    });
    for (name, pid) in [("reader", reader), ("writer", writer)] {
        cx.await_ready(name);
        cx.until(|| os::state_of(pid) == 'S');
    }
    not_blocking(&two);
    cx.ready_unspoilt();
    os::write(&one, if cx.spoiling() { b"wron\n" } else { b"line\n" }).unwrap();
    cx.same(
        "what was written",
        read_all(cx, &two, 40_000),
        os::bytes(5, 40_000),
    );
    cx.join("reader", reader);
    cx.join("writer", writer);
}

fn resize(cx: &Cx) {
    let (master, slave) = open_pty();
    let child = cx.child("leader", |cx| {
        lead(&slave);
        catch(libc::SIGWINCH);
        cx.ready(|| ignore(libc::SIGWINCH));
        std::fs::write(cx.path("asked"), "").unwrap();
        cx.check(cx.until(|| SIGNAL.load(Ordering::SeqCst) != 0), || {
            "no SIGWINCH".into()
        });
        cx.same("size", size(&slave), [50, 160, 0, 0]);
    });
    cx.ready_unspoilt();
    cx.await_file("asked");
    resize_to(&master, [50, 160, 0, 0]);
    cx.join("leader", child);
}

fn lock_echo(fd: &impl AsRawFd) {
    let mut bits = [0u8; 64];
    bits[12] = libc::ECHO as u8;
    ioctl(fd, TIOCSLCKTRMIOS, os::at(&bits)).unwrap();
}

fn locked_settings(cx: &Cx) {
    let (master, slave) = open_pty();
    lock_echo(&slave);
    let echo = || {
        no_echo(&slave);
        modes(&slave)[3] & libc::ECHO
    };
    let was = echo();
    cx.ready(|| ioctl(&slave, TIOCSLCKTRMIOS, os::at(&[0u8; 64])));
    cx.same("echo, locked", echo(), was);
    drop(master);
}

const CONSOLE: Need = Need {
    what: "a console (/dev/tty1, ttyS0 or console)",
    here: || open_console().is_some(),
};

fn open_console() -> Option<OwnedFd> {
    let console = ["/dev/tty1", "/dev/ttyS0", "/dev/console"];
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
    console
        .iter()
        .find_map(|path| os::open(path.as_ref(), flags).ok())
}

fn console(cx: &Cx) {
    let console = open_console().unwrap();
    let was = link(&console);
    cx.ready(|| os::dup_to(0, console.as_raw_fd()));
    cx.same("name", link(&console), was);
}

fn discipline(cx: &Cx) {
    // It reads and writes nothing.
    const N_NULL: i32 = 27;
    let (_master, slave) = open_pty();
    set(&slave, TIOCSETD, N_NULL);
    cx.ready(|| set(&slave, TIOCSETD, 0));
    cx.same("line discipline", get(&slave, TIOCGETD), N_NULL);
}

fn former_tty(cx: &Cx) {
    let (master, slave) = open_pty();
    let child = cx.child("leader", |cx| {
        ignore(libc::SIGHUP);
        lead(&slave);
        let tty = os::open("/dev/tty".as_ref(), libc::O_RDWR).unwrap();
        ioctl(&tty, libc::TIOCNOTTY as usize, 0).unwrap();
        let was = ids();
        cx.ready(|| os::dup_to(0, tty.as_raw_fd()));
        cx.same("ids", ids(), was);
        cx.same("name", link(&tty), "/dev/tty".into());
        cx.same("a write", os::write(&tty, b"told").ok(), Some(4));
    });
    drop(slave);
    not_blocking(&master);
    cx.ready_unspoilt();
    if !cx.spoiling() {
        cx.same("what it told", read_all(cx, &master, 4), b"told".to_vec());
    }
    cx.join("leader", child);
}

fn waits_refused(cx: &Cx) {
    let (master, slave) = open_pty();
    make_raw(&slave);
    os::write(&master, b"typed").unwrap();
    os::write(&slave, b"told").unwrap();
    cx.until(|| get(&slave, FIONREAD) == 5 && get(&master, FIONREAD) == 4);
    let (_locked, other) = open_pty();
    lock_echo(&other);
    not_blocking(&slave);
    not_blocking(&master);
    cx.ready(|| os::read_vec(&slave, 1));
    cx.same("input", read_all(cx, &slave, 5), b"typed".to_vec());
    cx.same("output", read_all(cx, &master, 4), b"told".to_vec());
}
