use super::*;
use freezeframe_error::Kind;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn stat_agrees_with_the_standard_library() {
    for path in ["/proc/self/exe", "/dev/null", "/tmp"] {
        let file = File::open(path).unwrap();
        let (stat, known) = (fstat(&file).unwrap(), file.metadata().unwrap());
        assert_eq!(
            (stat.dev, stat.ino, stat.mode),
            (known.dev(), known.ino(), known.mode())
        );
        assert_eq!((stat.size, stat.rdev), (known.size(), known.rdev()));
        assert_eq!((stat.uid, stat.gid), (known.uid(), known.gid()));
        assert_eq!(u64::from(stat.nlink), known.nlink());
        assert_eq!(
            stat.mtime_ns,
            known.mtime() * 1_000_000_000 + known.mtime_nsec()
        );
        let info = crate::proc::ProcDir::open(crate::Pid::this()).unwrap();
        let info = info.fdinfo(file.as_raw_fd()).unwrap();
        assert_eq!(stat.mnt_id, info.mnt_id as u64);
    }
    let root = File::open("/").unwrap();
    let exe = stat_at(&root, c"proc/self/exe", false).unwrap();
    assert_eq!(exe.file_type(), libc::S_IFLNK);
    let exe = stat_at(&root, c"proc/self/exe", true).unwrap();
    assert!(exe.same_file(&fstat(File::open("/proc/self/exe").unwrap()).unwrap()));
    let e = stat_at(&root, c"no/such", true).unwrap_err();
    assert_eq!(
        (e.errno(), e.object()),
        (Some(libc::ENOENT), Some("no/such"))
    );
}

#[test]
fn flags_owner_signal_seals_position() {
    let memfd = memfd_create(c"x", libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING).unwrap();
    assert!(cloexec(&memfd).unwrap());
    set_cloexec(&memfd, false).unwrap();
    assert!(!cloexec(&memfd).unwrap());
    let dup = dup_from(&memfd, 500).unwrap();
    assert!(dup.as_raw_fd() >= 500 && cloexec(&dup).unwrap());
    set_status_flags(&memfd, OFlag::O_APPEND).unwrap();
    assert!(
        status_flags(&dup)
            .unwrap()
            .contains(OFlag::O_APPEND | OFlag::O_RDWR)
    );
    assert_eq!(seals(&memfd).unwrap(), SealFlag::empty());
    add_seals(&memfd, SealFlag::F_SEAL_GROW).unwrap();
    assert_eq!(seals(&memfd).unwrap(), SealFlag::F_SEAL_GROW);
    set_position(&memfd, 7).unwrap();
    assert_eq!(position(&dup).unwrap(), 7);
    let again = reopen(&memfd, OFlag::O_RDONLY).unwrap();
    assert_eq!(position(&again).unwrap(), 0);
    assert!(fstat(&again).unwrap().same_file(&fstat(&memfd).unwrap()));

    let (a, _b) = pair(SockType::Stream);
    assert_eq!(owner(&a).unwrap(), None);
    let ours = std::process::id() as i32;
    for who in [
        Owner::Pid(ours),
        Owner::Tid(crate::Tid::this().0),
        Owner::Pgrp(nix::unistd::getpgrp().as_raw()),
    ] {
        set_owner(&a, who).unwrap();
        assert_eq!(owner(&a).unwrap(), Some(who));
    }
    assert_eq!(owner_uids(&a).unwrap().1, nix::unistd::geteuid().as_raw());
    assert_eq!(io_signal(&a).unwrap(), 0);
    set_io_signal(&a, libc::SIGUSR1).unwrap();
    assert_eq!(io_signal(&a).unwrap(), libc::SIGUSR1);
    let file = File::open("/proc/self/exe").unwrap();
    assert_eq!(lease(&file).unwrap(), libc::F_UNLCK);
    assert!(raise_nofile().unwrap() >= 500);
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = fds();
    make_room(300).unwrap();
    make_room(0).unwrap();
    make_room(u64::MAX).unwrap();
    assert_eq!(fds(), before);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let size = status.lines().find_map(|l| l.strip_prefix("FDSize:"));
    assert!(
        size.unwrap().trim().parse::<u64>().unwrap() >= 300,
        "{size:?}"
    );
}

#[test]
fn pipes_are_peeked_and_stay_full() {
    for size in [4096, 65536, 1 << 20] {
        let (reader, writer) = pipe_pair(OFlag::O_NONBLOCK).unwrap();
        assert_eq!(set_pipe_size(&writer, size).unwrap(), size);
        assert_eq!(peek_pipe(&reader).unwrap(), Vec::<Vec<u8>>::new());
        let content: Vec<u8> = (0..size).map(|i| (i / 3) as u8).collect();
        assert_eq!(nix::unistd::write(&writer, &content).unwrap(), size);
        for _ in 0..2 {
            assert_eq!(peek_pipe(&reader).unwrap().concat(), content);
        }
        assert_eq!(ioctl::readable_bytes(&reader).unwrap(), size);
        let mut seen = vec![0; size];
        File::from(reader).read_exact(&mut seen).unwrap();
        assert_eq!(seen, content);
    }
    // One byte in each slot: as many slots are needed as the pipe has.
    let (reader, writer) = pipe_pair(OFlag::O_DIRECT | OFlag::O_NONBLOCK).unwrap();
    let mut count = 0;
    while nix::unistd::write(&writer, &[count as u8]).is_ok() {
        count += 1;
    }
    let packets = peek_pipe(&reader).unwrap();
    assert_eq!(packets.len(), count);
    assert!(packets.iter().enumerate().all(|(i, p)| *p == [i as u8]));
    // Its other end, had from the writing one; and what the reader's end being
    // the only one left means.
    let other = reopen(&writer, OFlag::O_RDONLY | OFlag::O_NONBLOCK).unwrap();
    drop(writer);
    assert_eq!(peek_pipe(&other).unwrap().len(), count);
    assert!(peek_pipe(File::open("/dev/null").unwrap()).is_err());
}

#[test]
fn descriptors_travel() {
    let before = open_fds();
    {
        let (a, b) = pair(SockType::SeqPacket);
        let one = memfd_create(c"one", libc::MFD_CLOEXEC).unwrap();
        File::from(one.try_clone().unwrap())
            .write_all(b"1")
            .unwrap();
        let many = vec![one.as_fd(); 253];
        assert_eq!(send_fds(&a, b"hi", &many).unwrap(), 2);
        let mut buf = [0; 10];
        let (n, fds) = recv_fds(&b, &mut buf, Duration::from_secs(5)).unwrap();
        assert_eq!((n, &buf[..2], fds.len()), (2, b"hi".as_slice(), 253));
        for fd in &fds {
            assert!(cloexec(fd).unwrap());
            assert!(fstat(fd).unwrap().same_file(&fstat(&one).unwrap()));
        }
        send_fds(&a, b"no descriptors", &[]).unwrap();
        let (n, fds) = recv_fds(&b, &mut buf, Duration::from_secs(5)).unwrap();
        assert_eq!((n, fds.len()), (10, 0));
        let e = recv_fds(&b, &mut buf, Duration::from_millis(2)).unwrap_err();
        assert_eq!(e.kind(), Kind::Timeout);
        assert!(send_fds(&a, b"", &[]).is_err());
        assert!(send_fds(&a, b"x", &vec![one.as_fd(); 254]).is_err());
        drop(a);
        assert_eq!(recv_fds(&b, &mut buf, Duration::ZERO).unwrap().0, 0);
    }
    assert_eq!(open_fds(), before);
}

/// Bytes and number of descriptors of each message; long ones by their length.
fn flat(messages: &[Message]) -> Vec<(String, usize)> {
    messages
        .iter()
        .map(|m| (text(&m.data), m.fds.len()))
        .collect()
}

fn text(bytes: &[u8]) -> String {
    match bytes.len() {
        0..100 => String::from_utf8_lossy(bytes).into_owned(),
        len => format!("{len} bytes"),
    }
}

fn expected(list: &[(&str, usize)]) -> Vec<(String, usize)> {
    list.iter().map(|(t, n)| (t.to_string(), *n)).collect()
}

#[test]
fn stream_queues_keep_descriptors_with_their_bytes() {
    let before = open_fds();
    {
        let (a, b) = pair(SockType::Stream);
        assert!(peek_queue(&b).unwrap().is_empty());
        let null = File::open("/dev/null").unwrap();
        let fd = null.as_fd();
        send_fds(&a, b"plain", &[]).unwrap();
        send_fds(&a, b" and more", &[]).unwrap();
        assert_eq!(
            flat(&peek_stream(&b).unwrap()),
            expected(&[("plain and more", 0)])
        );
        send_fds(&a, b"one", &[fd]).unwrap();
        send_fds(&a, b"two", &[fd, fd]).unwrap();
        send_fds(&a, b"last", &[]).unwrap();
        let big = vec![7u8; 100_000];
        send_fds(&a, &big, &[fd]).unwrap();
        for _ in 0..2 {
            let runs = peek_queue(&b).unwrap();
            let seen = flat(&runs);
            assert_eq!(
                seen[..4],
                expected(&[("plain and more", 0), ("one", 1), ("two", 2), ("last", 0)])
            );
            assert_eq!(seen[4].1, 1);
            let rest: Vec<u8> = runs[4..].iter().flat_map(|m| m.data.clone()).collect();
            assert!(rest == big);
            assert!(runs[5..].iter().all(|m| m.fds.is_empty()));
            assert!(
                fstat(&runs[1].fds[0])
                    .unwrap()
                    .same_file(&fstat(&null).unwrap())
            );
        }
        let offset = getsockopt_i32(&b, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap();
        assert_eq!(offset, -1);
        let total = ioctl::readable_bytes(&b).unwrap();
        assert_eq!(total, 14 + 3 + 3 + 4 + big.len());
        assert!(ioctl::unsent_bytes(&a).unwrap() > total);
        // The other side's end changes nothing of what is queued.
        drop(a);
        assert_eq!(flat(&peek_queue(&b).unwrap())[2], ("two".to_string(), 2));
    }
    assert_eq!(open_fds(), before);
}

#[test]
fn message_queues_keep_boundaries() {
    for kind in [SockType::Datagram, SockType::SeqPacket] {
        let (a, b) = pair(kind);
        assert!(peek_queue(&b).unwrap().is_empty());
        let null = File::open("/dev/null").unwrap();
        let big = vec![9u8; 150_000];
        setsockopt_i32(&a, libc::SOL_SOCKET, libc::SO_SNDBUF, 400_000).unwrap();
        send_fds(&a, b"first", &[]).unwrap();
        nix::sys::socket::send(a.as_raw_fd(), b"", nix::sys::socket::MsgFlags::empty()).unwrap();
        send_fds(&a, b"second", &[null.as_fd()]).unwrap();
        send_fds(&a, &big, &[]).unwrap();
        send_fds(&a, b"last", &[]).unwrap();
        let all = expected(&[
            ("first", 0),
            ("", 0),
            ("second", 1),
            ("150000 bytes", 0),
            ("last", 0),
        ]);
        let seen = peek_queue(&b).unwrap();
        assert_eq!(flat(&seen), all);
        assert!(seen[3].data == big);
        let offset = getsockopt_i32(&b, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap();
        assert_eq!(offset, -1);
        drop(a);
        // The empty message is shown to one pass of peeks only.
        let again = peek_queue(&b).unwrap();
        assert_eq!(flat(&again), [&all[..1], &all[2..]].concat(), "{kind:?}");
        let mut buf = [0; 5];
        let (n, _) = recv_fds(&b, &mut buf, Duration::ZERO).unwrap();
        assert_eq!(&buf[..n], b"first");
    }
}

#[test]
fn senders_are_told() {
    let (a, b) = pair(SockType::Datagram);
    setsockopt_i32(&b, libc::SOL_SOCKET, libc::SO_PASSCRED, 1).unwrap();
    send_fds(&a, b"x", &[]).unwrap();
    let seen = peek_messages(&b).unwrap();
    let creds = seen[0].credentials.unwrap();
    assert_eq!(creds.pid, std::process::id() as i32);
    assert_eq!(creds.uid, nix::unistd::geteuid().as_raw());

    let receiver = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for text in ["one", "two"] {
        sender
            .send_to(text.as_bytes(), receiver.local_addr().unwrap())
            .unwrap();
    }
    let seen = peek_messages(&receiver).unwrap();
    assert_eq!(flat(&seen), expected(&[("one", 0), ("two", 0)]));
    let port = sender.local_addr().unwrap().port();
    assert_eq!(seen[0].from.len(), 16);
    assert_eq!(seen[0].from[2..4], port.to_be_bytes());
    assert_eq!(socket_address(&sender).unwrap(), seen[0].from);
    assert_eq!(
        peer_address(&sender).unwrap_err().errno(),
        Some(libc::ENOTCONN)
    );
}

#[test]
fn options() {
    let (a, _b) = pair(SockType::Stream);
    assert_eq!(
        getsockopt_i32(&a, libc::SOL_SOCKET, libc::SO_TYPE).unwrap(),
        libc::SOCK_STREAM
    );
    assert_eq!(getsockopt_linger(&a).unwrap(), (false, 0));
    setsockopt(
        &a,
        libc::SOL_SOCKET,
        libc::SO_LINGER,
        &[1, 0, 0, 0, 9, 0, 0, 0],
    )
    .unwrap();
    assert_eq!(getsockopt_linger(&a).unwrap(), (true, 9));
    assert_eq!(
        getsockopt(&a, libc::SOL_SOCKET, libc::SO_PEERCRED, 64)
            .unwrap()
            .len(),
        12
    );
    let e = setsockopt(&a, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &[0; 16]).unwrap_err();
    assert_eq!(e.kind(), Kind::Bug);
    assert!(getsockopt(&a, libc::SOL_SOCKET, libc::SO_GET_FILTER, 64).is_err());
    assert!(socket_filter(&a).unwrap().is_empty());
    let program = [[6u8, 0, 0, 0, 1, 0, 0, 0]; 3]; // BPF_RET of 1, thrice
    let attach = libc::sock_fprog {
        len: 3,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel reads `attach` and the three instructions it points to.
    let done = unsafe {
        let (level, option) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
        libc::setsockopt(a.as_raw_fd(), level, option, (&raw const attach).cast(), 16)
    };
    assert_eq!(done, 0);
    assert_eq!(socket_filter(&a).unwrap(), program);
    assert!(getsockopt(File::open("/dev/null").unwrap(), 1, 3, 4).is_err());
}

#[test]
fn ioctls() {
    use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK).unwrap();
    ioctl::set_timerfd_ticks(&timer, 42).unwrap();
    let mut ticks = [0; 8];
    nix::unistd::read(&timer, &mut ticks).unwrap();
    assert_eq!(u64::from_ne_bytes(ticks), 42);

    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
    ioctl::set_inotify_next_watch(&inotify, 9).unwrap();
    let wd = inotify.add_watch("/tmp", AddWatchFlags::IN_CREATE).unwrap();
    assert!(format!("{wd:?}").contains('9'));

    let pty = File::options()
        .read(true)
        .write(true)
        .open("/dev/ptmx")
        .unwrap();
    assert!(ioctl::pty_number(&pty).unwrap() >= 0);
    assert_eq!(ioctl::window_size(&pty).unwrap(), [0; 4]);
    assert_ne!(ioctl::termios(&pty).unwrap(), [0; 36]);
    assert!(ioctl::tty_session(File::open("/dev/null").unwrap()).is_err());

    let netns = ioctl::socket_netns(pair(SockType::Stream).0).unwrap();
    let ours = File::open("/proc/self/ns/net").unwrap();
    assert!(fstat(&netns).unwrap().same_file(&fstat(&ours).unwrap()));
    let userns = ioctl::namespace_owner(&netns).unwrap();
    assert_eq!(fstat(&userns).unwrap().file_type(), libc::S_IFREG);
    assert_eq!(
        ioctl::namespace_parent(&netns).unwrap_err().errno(),
        Some(libc::EINVAL)
    );

    let path = std::env::temp_dir().join(format!("ff-sys-unix-{}", std::process::id()));
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let file = ioctl::unix_socket_file(&listener).unwrap();
    assert_eq!(
        fstat(&file).unwrap().ino,
        std::fs::metadata(&path).unwrap().ino()
    );
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_peek_offset_of_the_target_stays() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    for kind in [SockType::Stream, SockType::SeqPacket] {
        let (a, b) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        nix::unistd::write(&a, b"0123456789").unwrap();
        setsockopt_i32(&b, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 5).unwrap();
        let seen = peek_queue(&b).unwrap();
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].data, b"0123456789");
        let now = getsockopt_i32(&b, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap();
        assert_eq!(now, 5);
    }
}
