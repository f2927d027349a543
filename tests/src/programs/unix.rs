//! Unix sockets with names: bound, listening, connected across processes, with files in flight.

use super::os::{self, errno};
use super::{Cx, Program, beyond, events};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, UnixCredentials, recvmsg, sendmsg,
};
use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "listening",
        "a listening socket's file, mode, owner and backlog; new connections",
        listening,
    ),
    Program::new(
        "abstract_name",
        "abstract and autobound names",
        abstract_name,
    ),
    Program::new(
        "bound",
        "sockets that are bound and nothing else, of every type",
        bound,
    ),
    Program::new(
        "connected",
        "a connection by a file's name, with data both ways",
        connected,
    ),
    Program::new(
        "connected_packets",
        "a connection of packets by an abstract name, the client bound too",
        connected_packets,
    ),
    Program::new(
        "listener_gone",
        "connections whose listening socket was closed, its file removed",
        listener_gone,
    ),
    Program::new(
        "waiting",
        "connections that wait to be accepted, in their order",
        waiting,
    ),
    Program::new(
        "waiting_closed",
        "a connection that waits to be accepted and was closed again",
        waiting_closed,
    )
    .refused_running("waits to be accepted and whose other end is closed"),
    Program::new(
        "waiting_with_data",
        "a connection that waits to be accepted and has been sent to",
        waiting_with_data,
    )
    .refused_running("waits to be accepted and has data"),
    Program::new("waiting_packets", "the same, of packets", waiting_packets)
        .refused_running("waits to be accepted and has data"),
    Program::new(
        "waiting_with_files",
        "a connection that waits to be accepted and has been sent a file",
        waiting_with_files,
    )
    .refused("descriptors in flight in a connection"),
    Program::new(
        "other_network",
        "a socket of another network",
        other_network,
    )
    .refused("another network namespace"),
    Program::new(
        "peers",
        "SO_PEERCRED, SO_PEERGROUPS and SO_PEERPIDFD of both ends, another user's",
        peers,
    ),
    Program::new(
        "workers",
        "a listening socket that several processes have, blocked in accept",
        workers,
    ),
    Program::new(
        "half_closed",
        "connections shut down for one direction",
        half_closed,
    ),
    Program::new(
        "reset",
        "a peer that closed with data unread: ECONNRESET, once",
        reset,
    ),
    Program::new(
        "datagrams",
        "messages of several senders with and without names, and answers to them",
        datagrams,
    ),
    Program::new(
        "datagrams_connected",
        "datagram sockets connected in a chain and to each other",
        datagrams_connected,
    ),
    Program::new(
        "datagrams_of_the_gone",
        "messages of senders that were closed; a peer that was closed",
        datagrams_of_the_gone,
    ),
    Program::new("renamed", "a socket file that was renamed", renamed),
    Program::new(
        "deleted",
        "a socket file that was deleted, its path another socket's now",
        deleted,
    ),
    Program::new(
        "relative",
        "a name relative to a directory that is not the working one",
        relative,
    ),
    Program::new(
        "files_in_flight",
        "files of many kinds on their way, several in a message, some held too",
        files_in_flight,
    ),
    Program::new(
        "sockets_in_flight",
        "sockets on their way with files on their way in them, and one in itself",
        sockets_in_flight,
    ),
    Program::new(
        "datagram_files",
        "files in datagrams to a name",
        datagram_files,
    ),
    Program::new(
        "credentials",
        "SCM_CREDENTIALS on their way, of a child, of another user",
        credentials,
    ),
    Program::new(
        "credentials_of_strangers",
        "SCM_CREDENTIALS of a process outside the tree, and of one that has ended",
        credentials_of_strangers,
    ),
    Program::new(
        "options",
        "options of sockets with names, a filter",
        options,
    ),
    Program::new(
        "many",
        "100 connections of four processes to one name",
        many,
    ),
    Program::new("urgent", "an out-of-band byte (MSG_OOB)", urgent).refused("out-of-band byte"),
    Program::new("bpf_filter", "an eBPF program as filter", bpf_filter)
        .refused("a BPF program on a unix socket")
        .needs(&[beyond::BPF]),
    Program::new(
        "epoll_in_flight",
        "an epoll instance on its way",
        epoll_in_flight,
    )
    .refused("an epoll instance in flight"),
    Program::new(
        "epoll_of_a_file_in_flight",
        "an epoll target that is nowhere but on its way",
        epoll_of_a_file_in_flight,
    )
    .refused("epoll watches"),
    Program::new(
        "inotify_in_flight",
        "an inotify instance on its way",
        inotify_in_flight,
    )
    .refused("an inotify instance in flight"),
    Program::new(
        "watched_in_flight",
        "an inotify watch on a deleted file that is nowhere but on its way",
        watched_in_flight,
    )
    .refused("on a deleted file"),
    Program::new(
        "fanotify_in_flight",
        "a fanotify group on its way",
        fanotify_in_flight,
    )
    .refused("a fanotify group in flight"),
];

fn raw_option<const N: usize>(fd: &impl AsRawFd, name: i32) -> [i32; N] {
    let (mut value, mut len) = ([0i32; N], 4 * N as u32);
    let level = libc::SOL_SOCKET as usize;
    let args = [
        os::raw(fd),
        level,
        name as usize,
        os::at_mut(&mut value),
        os::at_mut(&mut len),
        0,
    ];
    match os::syscall(libc::SYS_getsockopt, args) {
        Ok(_) => value,
        Err(e) => [-e.raw_os_error().unwrap_or(1); N],
    }
}

fn option(fd: &impl AsRawFd, name: i32) -> i32 {
    raw_option::<1>(fd, name)[0]
}

fn set_option(fd: &impl AsRawFd, name: i32, value: i32) {
    let level = libc::SOL_SOCKET as usize;
    let args = [os::raw(fd), level, name as usize, os::at(&value), 4, 0];
    os::syscall(libc::SYS_setsockopt, args).unwrap();
}

fn socket(kind: i32) -> OwnedFd {
    let args = [libc::AF_UNIX as usize, kind as usize, 0, 0, 0, 0];
    os::fd_from(libc::SYS_socket, args).unwrap()
}

fn bind(fd: &OwnedFd, to: &UnixAddr) {
    nix::sys::socket::bind(fd.as_raw_fd(), to).unwrap();
}

fn connect(fd: &OwnedFd, to: &UnixAddr) {
    nix::sys::socket::connect(fd.as_raw_fd(), to).unwrap();
}

fn at_path(path: &std::path::Path) -> UnixAddr {
    UnixAddr::new(path).unwrap()
}

/// An abstract name of this program alone.
fn own_name(what: &str) -> Vec<u8> {
    format!("ff-{}-{what}", os::getpid()).into_bytes()
}

fn abstract_addr(what: &str) -> UnixAddr {
    UnixAddr::new_abstract(&own_name(what)).unwrap()
}

fn accept(fd: &impl AsRawFd) -> os::Result<OwnedFd> {
    let args = [os::raw(fd), 0, 0, libc::SOCK_CLOEXEC as usize, 0, 0];
    os::fd_from(libc::SYS_accept4, args)
}

/// getsockname, or getpeername, as bytes behind the family.
fn name_of(nr: i64, fd: &impl AsRawFd) -> Vec<u8> {
    let (mut address, mut len) = ([0u8; 112], 112u32);
    let args = [
        os::raw(fd),
        os::at_mut(&mut address),
        os::at_mut(&mut len),
        0,
        0,
        0,
    ];
    match os::syscall(nr, args) {
        Ok(_) => address[2.min(len as usize)..len as usize].to_vec(),
        Err(e) => format!("{e}").into_bytes(),
    }
}

fn own(fd: &impl AsRawFd) -> Vec<u8> {
    name_of(libc::SYS_getsockname, fd)
}

fn peer(fd: &impl AsRawFd) -> Vec<u8> {
    name_of(libc::SYS_getpeername, fd)
}

fn names(all: &[&dyn AsRawFd]) -> Vec<(Vec<u8>, Vec<u8>)> {
    struct Raw(i32);
    impl AsRawFd for Raw {
        fn as_raw_fd(&self) -> i32 {
            self.0
        }
    }
    let raw = all.iter().map(|fd| Raw(fd.as_raw_fd()));
    raw.map(|fd| (own(&fd), peer(&fd))).collect()
}

fn text(read: os::Result<Vec<u8>>) -> String {
    match read {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(e) => format!("{e}"),
    }
}

/// What one read gives, without waiting.
fn got(fd: &impl AsRawFd) -> String {
    let mut buffer = vec![0u8; 65536];
    let flags = libc::MSG_DONTWAIT as usize;
    let args = [
        os::raw(fd),
        os::at_mut(&mut buffer[..]),
        buffer.len(),
        flags,
        0,
        0,
    ];
    text(os::syscall(libc::SYS_recvfrom, args).map(|n| buffer[..n as usize].to_vec()))
}

fn goes(cx: &Cx, what: &str, from: &impl AsRawFd, to: &impl AsRawFd) {
    let sent = os::write(from, what.as_bytes());
    cx.same(&format!("{what}: bytes sent"), sent.ok(), Some(what.len()));
    cx.same(&format!("{what}: arrives"), got(to), what.to_owned());
}

fn shut(fd: &impl AsRawFd, how: i32) {
    os::syscall(libc::SYS_shutdown, [os::raw(fd), how as usize, 0, 0, 0, 0]).unwrap();
}

/// How many connections a listening socket takes without accepting.
fn room(path: &std::path::Path) -> usize {
    let mut taken = Vec::new();
    loop {
        let fd = socket(libc::SOCK_STREAM | libc::SOCK_NONBLOCK);
        if nix::sys::socket::connect(fd.as_raw_fd(), &at_path(path)).is_err() {
            return taken.len();
        }
        taken.push(fd);
    }
}

fn listening(cx: &Cx) {
    let path = cx.path("s");
    let listener = socket(libc::SOCK_STREAM);
    bind(&listener, &at_path(&path));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&path, Some(1234), Some(2345)).unwrap();
    os::syscall(libc::SYS_listen, [os::raw(&listener), 3, 0, 0, 0, 0]).unwrap();
    let state = || {
        let file = fs::metadata(&path).map(|m| (m.mode(), m.uid(), m.gid()));
        let socket = (own(&listener), option(&listener, libc::SO_ACCEPTCONN));
        (
            file.ok(),
            socket,
            raw_option::<3>(&listener, libc::SO_PEERCRED),
        )
    };
    let was = state();
    cx.ready(|| fs::remove_file(&path).unwrap());
    cx.same("file, name, credentials", state(), was);
    os::fcntl(&listener, libc::F_SETFL, libc::O_NONBLOCK as usize).unwrap();
    let client = UnixStream::connect(&path);
    let server = accept(&listener);
    match (client, server) {
        (Ok(client), Ok(server)) => goes(cx, "hello", &client, &server),
        other => cx.fault(format!("no connection: {other:?}")),
    }
    cx.same("connections that may wait", room(&path), 4);
    let in_dir: Vec<_> = fs::read_dir(cx.path("")).unwrap().flatten().collect();
    let ours = in_dir
        .iter()
        .filter(|e| e.file_name().to_string_lossy().starts_with('.'));
    cx.same("files left behind", ours.count(), 0);
}

fn abstract_name(cx: &Cx) {
    let address = SocketAddr::from_abstract_name(own_name("a")).unwrap();
    let listener = RefCell::new(Some(UnixListener::bind_addr(&address).unwrap()));
    let automatic = socket(libc::SOCK_DGRAM);
    let family = libc::AF_UNIX as u16;
    os::syscall(
        libc::SYS_bind,
        [os::raw(&automatic), os::at(&family), 2, 0, 0, 0],
    )
    .unwrap();
    let was = own(&automatic);
    cx.check(was.len() == 6 && was[0] == 0, || {
        format!("automatic name {was:?}")
    });
    cx.ready(|| listener.take());
    cx.same("the automatic name", own(&automatic), was.clone());
    let sender = UnixDatagram::unbound().unwrap();
    let to = SocketAddr::from_abstract_name(&was[1..]).unwrap();
    cx.same("sent to it", sender.send_to_addr(b"x", &to).ok(), Some(1));
    cx.same("arrived", got(&automatic), "x".to_owned());
    let client = UnixStream::connect_addr(&address);
    cx.check(client.is_ok(), || format!("connect: {client:?}"));
    if let Some(listener) = listener.take() {
        cx.check(listener.accept().is_ok(), || "accept".to_owned());
    }
}

fn bound(cx: &Cx) {
    let all: Vec<_> = [libc::SOCK_STREAM, libc::SOCK_SEQPACKET, libc::SOCK_DGRAM]
        .into_iter()
        .flat_map(|kind| [(kind, true), (kind, false)])
        .map(|(kind, file)| {
            let fd = socket(kind);
            let name = format!("k{kind}");
            match file {
                true => bind(&fd, &at_path(&cx.path(&name))),
                false => bind(&fd, &abstract_addr(&name)),
            }
            fd
        })
        .collect();
    let state = || {
        let kind = |fd| option(fd, libc::SO_TYPE);
        all.iter()
            .map(|fd| (own(fd), peer(fd), kind(fd)))
            .collect::<Vec<_>>()
    };
    let was = state();
    let file = cx.path("k1");
    cx.ready(|| fs::remove_file(&file).unwrap());
    cx.same("names, peers, types", state(), was);
    let is_socket = fs::metadata(&file).is_ok_and(|m| m.file_type().is_socket());
    cx.check(is_socket, || "no socket file".to_owned());
    cx.check(UnixStream::connect(&file).is_err(), || {
        "it listens".to_owned()
    });
    os::syscall(libc::SYS_listen, [os::raw(&all[0]), 3, 0, 0, 0, 0]).unwrap();
    cx.check(UnixStream::connect(&file).is_ok(), || {
        "it cannot listen".to_owned()
    });
}

fn connected(cx: &Cx) {
    let path = cx.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let (server, _) = listener.accept().unwrap();
    let second = UnixStream::connect(&path).unwrap();
    let (second_server, _) = listener.accept().unwrap();
    (&client).write_all(b"to the server").unwrap();
    (&server).write_all(b"to the client").unwrap();
    (&second).write_all(b"of the second").unwrap();
    let all = || names(&[&listener, &client, &server, &second, &second_server]);
    let was = all();
    cx.ready(|| got(&server));
    cx.same("names", all(), was);
    cx.same("the server gets", got(&server), "to the server".to_owned());
    cx.same("the client gets", got(&client), "to the client".to_owned());
    cx.same(
        "the other gets",
        got(&second_server),
        "of the second".to_owned(),
    );
    goes(cx, "later", &client, &server);
    goes(cx, "back", &server, &client);
    let third = UnixStream::connect(&path);
    let accepted = listener.accept();
    cx.check(third.is_ok() && accepted.is_ok(), || {
        format!("{third:?}, {accepted:?}")
    });
    drop(client);
    cx.same("at the end", got(&server), String::new());
}

fn connected_packets(cx: &Cx) {
    let (listener, client) = (socket(libc::SOCK_SEQPACKET), socket(libc::SOCK_SEQPACKET));
    bind(&listener, &abstract_addr("packets"));
    os::syscall(libc::SYS_listen, [os::raw(&listener), 5, 0, 0, 0, 0]).unwrap();
    bind(&client, &at_path(&cx.path("client")));
    connect(&client, &abstract_addr("packets"));
    let server = accept(&listener).unwrap();
    for packet in ["one", "two2", "three"] {
        os::write(&client, packet.as_bytes()).unwrap();
    }
    os::write(&server, b"answer").unwrap();
    let all = || names(&[&listener, &client, &server]);
    let was = all();
    cx.ready(|| got(&server));
    cx.same("names", all(), was);
    for packet in ["one", "two2", "three"] {
        cx.same("packet", got(&server), packet.to_owned());
    }
    cx.same("answer", got(&client), "answer".to_owned());
    goes(cx, "again", &client, &server);
    let file = fs::metadata(cx.path("client"));
    cx.check(file.is_ok(), || format!("the client's file: {file:?}"));
}

fn listener_gone(cx: &Cx) {
    let path = cx.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let (server, _) = listener.accept().unwrap();
    drop(listener);
    fs::remove_file(&path).unwrap();
    let address = SocketAddr::from_abstract_name(own_name("g")).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let lone_client = UnixStream::connect_addr(&address).unwrap();
    drop(listener.accept().unwrap());
    let gone_client = UnixStream::connect_addr(&address).unwrap();
    let (lone_server, _) = listener.accept().unwrap();
    (&gone_client).write_all(b"farewell").unwrap();
    drop((gone_client, listener));
    let all = || names(&[&client, &server, &lone_client, &lone_server]);
    let was = all();
    cx.ready(|| (&client).write_all(b"x"));
    cx.same("names", all(), was);
    goes(cx, "on", &client, &server);
    goes(cx, "back", &server, &client);
    cx.same(
        "what the gone one sent",
        got(&lone_server),
        "farewell".to_owned(),
    );
    cx.same("then the end", got(&lone_server), String::new());
    cx.same("the end of the other", got(&lone_client), String::new());
    cx.same("errno", errno(&os::write(&lone_client, b"x")), libc::EPIPE);
    cx.check(!path.exists(), || "the file is there again".to_owned());
    let again = UnixListener::bind_addr(&address);
    cx.check(again.is_ok(), || format!("the name is taken: {again:?}"));
}

fn waiting(cx: &Cx) {
    let path = cx.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    let clients: Vec<_> = (0..3)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    let bound = socket(libc::SOCK_STREAM);
    bind(&bound, &at_path(&cx.path("c")));
    connect(&bound, &at_path(&path));
    let was = names(&[&clients[0], &bound]);
    cx.ready(|| listener.accept());
    cx.same("names", names(&[&clients[0], &bound]), was);
    listener.set_nonblocking(true).unwrap();
    for (i, client) in clients.iter().enumerate() {
        let Ok((server, _)) = listener.accept() else {
            cx.fault(format!("no connection {i}"));
            continue;
        };
        goes(cx, &format!("client {i}"), client, &server);
        goes(cx, &format!("answer {i}"), &server, client);
    }
    match listener.accept() {
        Ok((server, _)) => goes(cx, "bound", &bound, &server),
        Err(e) => cx.fault(format!("the bound one: {e}")),
    }
    cx.check(listener.accept().is_err(), || "one too many".to_owned());
}

fn waiting_closed(cx: &Cx) {
    let path = cx.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    for words in ["early", "", "and late"] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(words.as_bytes()).unwrap();
    }
    cx.ready(|| listener.accept());
    listener.set_nonblocking(true).unwrap();
    for words in ["early", "", "and late"] {
        let Ok((mut server, _)) = listener.accept() else {
            return cx.fault("it is not there");
        };
        let mut all = String::new();
        server.set_nonblocking(true).unwrap();
        let read = server.read_to_string(&mut all).ok();
        cx.same(
            "data, and the end",
            (read, &all[..]),
            (Some(words.len()), words),
        );
    }
}

fn waiting_packets(cx: &Cx) {
    let path = cx.path("s");
    let listener = socket(libc::SOCK_SEQPACKET);
    bind(&listener, &at_path(&path));
    os::syscall(libc::SYS_listen, [os::raw(&listener), 8, 0, 0, 0, 0]).unwrap();
    let client = socket(libc::SOCK_SEQPACKET);
    connect(&client, &at_path(&path));
    for packet in [&b"one"[..], b"and two"] {
        os::write(&client, packet).unwrap();
    }
    cx.ready(|| os::write(&client, b"spoilt"));
    let args = [os::raw(&listener), 0, 0, libc::SOCK_NONBLOCK as usize, 0, 0];
    let server = os::fd_from(libc::SYS_accept4, args).unwrap();
    for packet in [&b"one"[..], b"and two"] {
        let got = os::read_vec(&server, 99).ok();
        cx.same("packet", got, Some(packet.to_vec()));
    }
    let more = os::errno(&os::read_vec(&server, 99));
    cx.same("no more", more, libc::EAGAIN);
    goes(cx, "later", &client, &server);
}

fn waiting_with_files(cx: &Cx) {
    let path = cx.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    let client = OwnedFd::from(UnixStream::connect(&path).unwrap());
    super::sockets::send_fd(&client, &fs::File::open("/dev/null").unwrap());
    cx.ready(|| listener.accept());
    listener.set_nonblocking(true).unwrap();
    let server = listener.accept().map(|(server, _)| server);
    let got = server
        .ok()
        .and_then(|s| super::sockets::receive_fd(&s.into()));
    cx.check(got.is_some(), || "the file is not there".to_owned());
}

fn other_network(cx: &Cx) {
    let fd = super::netlink::elsewhere(|| socket(libc::SOCK_STREAM));
    cx.ready(|| bind(&fd, &at_path(&cx.path("s"))));
    let fresh = socket(libc::SOCK_STREAM);
    cx.same("name", names(&[&fd]), names(&[&fresh]));
}

fn waiting_with_data(cx: &Cx) {
    let path = cx.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"early").unwrap();
    let spoilt = Cell::new(false);
    cx.ready(|| spoilt.set(true));
    let (mut server, _) = listener.accept().unwrap();
    server.set_nonblocking(true).unwrap();
    let mut buffer = [0; 5];
    let read = server.read_exact(&mut buffer);
    cx.check(read.is_ok() && &buffer == b"early" && !spoilt.get(), || {
        format!("{read:?}")
    });
}

/// SO_PEERCRED, SO_PEERGROUPS and the process of SO_PEERPIDFD.
fn peer_of(fd: &impl AsRawFd) -> ([i32; 3], [i32; 2], String) {
    const SO_PEERGROUPS: i32 = 59;
    const SO_PEERPIDFD: i32 = 77;
    let pidfd = option(fd, SO_PEERPIDFD);
    let pid = match pidfd {
        3.. => {
            // SAFETY: the kernel has just made this descriptor for us.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            os::fdinfo(&pidfd, "Pid")
        }
        other => format!("error {other}"),
    };
    (
        raw_option(fd, libc::SO_PEERCRED),
        raw_option(fd, SO_PEERGROUPS),
        pid,
    )
}

fn peers(cx: &Cx) {
    let path = cx.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    let child = cx.child("client", |cx| {
        let groups = [77u32, 78];
        os::syscall(libc::SYS_setgroups, [2, os::at(&groups), 0, 0, 0, 0]).unwrap();
        os::syscall(libc::SYS_setresgid, [1001, 1001, 1001, 0, 0, 0]).unwrap();
        os::syscall(libc::SYS_setresuid, [1000, 1000, 1000, 0, 0, 0]).unwrap();
        // Behind: the directory of the protocol is anybody's.
        let client = UnixStream::connect(cx.path("s")).unwrap();
        let was = peer_of(&client);
        cx.ready_unspoilt();
        cx.same("the listening side", peer_of(&client), was);
        cx.same("greeting", got(&client), "hello".to_owned());
    });
    let (server, _) = listener.accept().unwrap();
    (&server).write_all(b"hello").unwrap();
    let (one, other) = os::socketpair(libc::SOCK_STREAM);
    let state = || (peer_of(&server), peer_of(&one), peer_of(&other));
    let mut was = state();
    cx.same("set up", was.0.0, [child, 1000, 1001]);
    if cx.spoiling() {
        was.0.0[1] = 7;
    }
    cx.ready(|| {});
    cx.same("the connecting side", state(), was);
    cx.join("client", child);
}

fn workers(cx: &Cx) {
    let path = cx.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    let served = |cx: &Cx| {
        cx.say_ready();
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(b"served").unwrap();
        cx.same(
            "the client's end",
            text(os::read_vec(&server, 9)),
            "thanks".to_owned(),
        );
    };
    let children = ["one", "two"].map(|name| (name, cx.child_unready(name, served)));
    for (name, pid) in children {
        cx.await_ready(name);
        cx.until(|| os::state_of(pid) == 'S');
    }
    let thanks = Cell::new("thanks");
    cx.ready(|| thanks.set("no"));
    for _ in children {
        match UnixStream::connect(&path) {
            Ok(client) => {
                cx.same(
                    "served",
                    text(os::read_vec(&client, 9)),
                    "served".to_owned(),
                );
                (&client).write_all(thanks.get().as_bytes()).unwrap();
            }
            Err(e) => cx.fault(format!("connect: {e}")),
        }
    }
    for (name, pid) in children {
        cx.join(name, pid);
    }
}

fn half_closed(cx: &Cx) {
    let path = cx.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    let pair = || {
        let client = UnixStream::connect(&path).unwrap();
        (client, listener.accept().unwrap().0)
    };
    let (write, read, both) = (pair(), pair(), pair());
    (&write.0).write_all(b"last words").unwrap();
    (&both.1).write_all(b"unread").unwrap();
    shut(&write.0, libc::SHUT_WR);
    shut(&read.0, libc::SHUT_RD);
    shut(&both.1, libc::SHUT_RDWR);
    cx.ready(|| shut(&write.1, libc::SHUT_WR));
    cx.same("last words", got(&write.1), "last words".to_owned());
    cx.same("then the end", got(&write.1), String::new());
    goes(cx, "still", &write.1, &write.0);
    cx.same("its errno", errno(&os::write(&write.0, b"x")), libc::EPIPE);
    cx.same(
        "errno to one that reads not",
        errno(&os::write(&read.1, b"x")),
        libc::EPIPE,
    );
    goes(cx, "it writes", &read.0, &read.1);
    cx.same("unread", got(&both.0), "unread".to_owned());
    cx.same("the end", got(&both.0), String::new());
    cx.same("errno", errno(&os::write(&both.0, b"x")), libc::EPIPE);
}

fn reset(cx: &Cx) {
    let (one, other) = os::socketpair(libc::SOCK_STREAM);
    os::write(&one, b"never read").unwrap();
    drop(other);
    let path = cx.path("s");
    let listener = UnixListener::bind(&path).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let (server, _) = listener.accept().unwrap();
    (&server).write_all(b"unread").unwrap();
    (&client).write_all(b"queued").unwrap();
    drop(client);
    cx.ready(|| option(&one, libc::SO_ERROR));
    cx.same("SO_ERROR", option(&one, libc::SO_ERROR), libc::ECONNRESET);
    cx.same("SO_ERROR again", option(&one, libc::SO_ERROR), 0);
    let error = std::io::Error::from_raw_os_error(libc::ECONNRESET).to_string();
    let first = got(&server);
    let second = got(&server);
    let order = [first, second];
    cx.check(
        order.contains(&error) && order.contains(&"queued".to_owned()),
        || format!("read {order:?}"),
    );
}

/// A datagram and its sender's name.
fn datagram(fd: &impl AsRawFd) -> (String, Vec<u8>) {
    let (mut data, mut name, mut len) = ([0u8; 100], [0u8; 112], 112u32);
    let flags = libc::MSG_DONTWAIT as usize;
    let args = [
        os::raw(fd),
        os::at_mut(&mut data),
        data.len(),
        flags,
        os::at_mut(&mut name),
        os::at_mut(&mut len),
    ];
    match os::syscall(libc::SYS_recvfrom, args) {
        Ok(n) => (
            String::from_utf8_lossy(&data[..n as usize]).into_owned(),
            name[2.min(len as usize)..len as usize].to_vec(),
        ),
        Err(e) => (format!("{e}"), Vec::new()),
    }
}

fn datagrams(cx: &Cx) {
    let server = UnixDatagram::bind(cx.path("server")).unwrap();
    let one = UnixDatagram::bind(cx.path("one")).unwrap();
    let address = SocketAddr::from_abstract_name(own_name("two")).unwrap();
    let two = UnixDatagram::bind_addr(&address).unwrap();
    let nameless = UnixDatagram::unbound().unwrap();
    nameless.connect(cx.path("server")).unwrap();
    one.send_to(b"first", cx.path("server")).unwrap();
    nameless.send(b"second").unwrap();
    two.send_to(b"third", cx.path("server")).unwrap();
    one.send_to(b"", cx.path("server")).unwrap();
    server.send_to(b"to one", cx.path("one")).unwrap();
    let was = (own(&one), own(&two), own(&server));
    cx.ready(|| datagram(&server));
    let expected = [
        ("first", was.0.clone()),
        ("second", vec![]),
        ("third", was.1.clone()),
        ("", was.0.clone()),
    ];
    for (data, name) in expected {
        cx.same("message", datagram(&server), (data.to_owned(), name));
    }
    cx.same(
        "no more",
        errno(&os::read_vec(nonblocking(&server), 9)),
        libc::EAGAIN,
    );
    cx.same(
        "to one",
        datagram(&one),
        ("to one".to_owned(), was.2.clone()),
    );
    cx.same("names", (own(&one), own(&two), own(&server)), was);
    goes(cx, "of the nameless", &nameless, &server);
    let sent = server.send_to(b"answer", cx.path("one"));
    cx.same("sent", sent.ok(), Some(6));
    cx.same("answer", got(&one), "answer".to_owned());
    cx.same(
        "answer to two",
        server.send_to_addr(b"x", &address).ok(),
        Some(1),
    );
}

fn nonblocking(fd: &UnixDatagram) -> &UnixDatagram {
    fd.set_nonblocking(true).unwrap();
    fd
}

fn datagrams_connected(cx: &Cx) {
    let named = |name: &str| UnixDatagram::bind(cx.path(name)).unwrap();
    let (a, b, c) = (named("a"), named("b"), named("c"));
    let (x, y) = (named("x"), named("y"));
    a.connect(cx.path("b")).unwrap();
    c.send_to(b"of c", cx.path("b")).unwrap();
    b.connect(cx.path("c")).unwrap();
    a.send(b"of a").unwrap_err();
    x.connect(cx.path("y")).unwrap();
    y.connect(cx.path("x")).unwrap();
    // More than an unconnected one would take.
    for i in 0..30u8 {
        x.send(&[i]).unwrap();
    }
    let was = names(&[&a, &b, &c, &x, &y]);
    cx.ready(|| datagram(&y));
    cx.same("names", names(&[&a, &b, &c, &x, &y]), was);
    cx.same("of c", got(&b), "of c".to_owned());
    for i in 0..30u8 {
        cx.same("message", datagram(&y).0.into_bytes(), vec![i]);
    }
    goes(cx, "b to c", &b, &c);
    goes(cx, "y to x", &y, &x);
    let refused = a.send(b"x").err().and_then(|e| e.raw_os_error());
    cx.same("a to b", refused, Some(libc::EPERM));
    let third = a
        .send_to(b"x", cx.path("y"))
        .err()
        .and_then(|e| e.raw_os_error());
    cx.same("a to y", third, Some(libc::EPERM));
}

fn datagrams_of_the_gone(cx: &Cx) {
    let server = UnixDatagram::bind(cx.path("server")).unwrap();
    let gone = UnixDatagram::bind(cx.path("gone")).unwrap();
    gone.send_to(b"of a file", cx.path("server")).unwrap();
    let file_name = own(&gone);
    drop(gone);
    fs::remove_file(cx.path("gone")).unwrap();
    let address = SocketAddr::from_abstract_name(own_name("gone")).unwrap();
    let gone = UnixDatagram::bind_addr(&address).unwrap();
    gone.send_to(b"of a name", cx.path("server")).unwrap();
    let abstract_name = own(&gone);
    drop(gone);
    UnixDatagram::unbound()
        .unwrap()
        .send_to(b"of nobody", cx.path("server"))
        .unwrap();
    let lone = UnixDatagram::unbound().unwrap();
    let closed = UnixDatagram::bind(cx.path("closed")).unwrap();
    lone.connect(cx.path("closed")).unwrap();
    drop(closed);
    fs::remove_file(cx.path("closed")).unwrap();
    let was = peer(&lone);
    cx.ready(|| datagram(&server));
    cx.same("1", datagram(&server), ("of a file".to_owned(), file_name));
    cx.same(
        "2",
        datagram(&server),
        ("of a name".to_owned(), abstract_name),
    );
    cx.same("3", datagram(&server), ("of nobody".to_owned(), vec![]));
    cx.same("the closed one's name", peer(&lone), was);
    let error = lone.send(b"x").err().and_then(|e| e.raw_os_error());
    cx.same("errno", error, Some(libc::ECONNREFUSED));
    cx.check(
        !cx.path("gone").exists() && !cx.path("closed").exists(),
        || "files".to_owned(),
    );
    cx.check(UnixDatagram::bind_addr(&address).is_ok(), || {
        "the name is taken".to_owned()
    });
}

fn renamed(cx: &Cx) {
    let (old, new) = (cx.path("old"), cx.path("new"));
    let listener = UnixListener::bind(&old).unwrap();
    fs::rename(&old, &new).unwrap();
    let client = UnixStream::connect(&new).unwrap();
    let (server, _) = listener.accept().unwrap();
    let was = names(&[&listener, &client, &server]);
    cx.ready(|| fs::remove_file(&new).unwrap());
    cx.same("names", names(&[&listener, &client, &server]), was);
    goes(cx, "on", &client, &server);
    cx.check(!old.exists(), || "a file has its old name".to_owned());
    cx.check(UnixStream::connect(&new).is_ok(), || {
        "no way to connect".to_owned()
    });
}

fn deleted(cx: &Cx) {
    let path = cx.path("s");
    let first = UnixListener::bind(&path).unwrap();
    let of_first = UnixStream::connect(&path).unwrap();
    let (server, _) = first.accept().unwrap();
    fs::remove_file(&path).unwrap();
    let second = UnixListener::bind(&path).unwrap();
    let of_second = UnixStream::connect(&path).unwrap();
    let was = names(&[&first, &second, &of_first, &of_second, &server]);
    cx.ready(|| fs::remove_file(&path).unwrap());
    let now = names(&[&first, &second, &of_first, &of_second, &server]);
    cx.same("names", now, was);
    goes(cx, "first", &of_first, &server);
    second.set_nonblocking(true).unwrap();
    match second.accept() {
        Ok((server, _)) => goes(cx, "second", &of_second, &server),
        Err(e) => cx.fault(format!("accept: {e}")),
    }
    first.set_nonblocking(true).unwrap();
    cx.check(UnixStream::connect(&path).is_ok(), || {
        "no way to connect".to_owned()
    });
    cx.check(second.accept().is_ok(), || "it went elsewhere".to_owned());
    cx.check(first.accept().is_err(), || {
        "it came to the first".to_owned()
    });
}

fn relative(cx: &Cx) {
    fs::create_dir(cx.path("in")).unwrap();
    let listener = socket(libc::SOCK_STREAM);
    std::env::set_current_dir(cx.path("in")).unwrap();
    bind(&listener, &UnixAddr::new("../in/./s").unwrap());
    std::env::set_current_dir("/").unwrap();
    os::syscall(libc::SYS_listen, [os::raw(&listener), 3, 0, 0, 0, 0]).unwrap();
    let client = UnixStream::connect(cx.path("in/s")).unwrap();
    let server = accept(&listener).unwrap();
    let was = names(&[&listener, &client, &server]);
    cx.ready(|| fs::remove_file(cx.path("in/s")).unwrap());
    cx.same("names", names(&[&listener, &client, &server]), was);
    goes(cx, "on", &client, &server);
    let again = UnixStream::connect(cx.path("in/s"));
    cx.check(again.is_ok(), || format!("connect: {again:?}"));
    cx.check(!std::path::Path::new("/s").exists(), || {
        "a stray file".to_owned()
    });
}

/// Sends bytes with files, to an address or the peer.
fn send_files(by: &impl AsRawFd, data: &[u8], files: &[&dyn AsRawFd], to: Option<&UnixAddr>) {
    let fds: Vec<i32> = files.iter().map(|f| f.as_raw_fd()).collect();
    let message = [ControlMessage::ScmRights(&fds)];
    let data = [IoSlice::new(data)];
    sendmsg(by.as_raw_fd(), &data, &message, MsgFlags::empty(), to).unwrap();
}

/// One message: its bytes, its files, its sender as SCM_CREDENTIALS has it.
fn receive(by: &impl AsRawFd) -> (String, Vec<OwnedFd>, Option<[i32; 3]>) {
    let mut data = [0u8; 200];
    let mut parts = [IoSliceMut::new(&mut data)];
    let mut space = vec![0u8; 4096];
    let flags = MsgFlags::MSG_DONTWAIT;
    let got = match recvmsg::<UnixAddr>(by.as_raw_fd(), &mut parts, Some(&mut space), flags) {
        Ok(got) => got,
        Err(e) => return (format!("{e}"), Vec::new(), None),
    };
    let (mut files, mut who) = (Vec::new(), None);
    for part in got.cmsgs().unwrap() {
        match part {
            ControlMessageOwned::ScmRights(fds) => {
                // SAFETY: the kernel has just made these descriptors for the message; nobody else owns them.
                files.extend(fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
            }
            ControlMessageOwned::ScmCredentials(c) => {
                who = Some([c.pid(), c.uid() as i32, c.gid() as i32]);
            }
            _ => {}
        }
    }
    let bytes = got.bytes;
    (
        String::from_utf8_lossy(&data[..bytes]).into_owned(),
        files,
        who,
    )
}

fn files_in_flight(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let (r, w) = os::pipe(0);
    let file = os::open(&cx.path("file"), libc::O_RDWR | libc::O_CREAT).unwrap();
    os::write(&file, b"0123456789").unwrap();
    os::lseek(&file, 4, libc::SEEK_SET).unwrap();
    let event = os::fd_from(libc::SYS_eventfd2, [7, 0, 0, 0, 0, 0]).unwrap();
    let timer = os::fd_from(libc::SYS_timerfd_create, [1, 0, 0, 0, 0, 0]).unwrap();
    let memory = nix::sys::memfd::memfd_create(c"m", nix::sys::memfd::MFdFlags::empty()).unwrap();
    os::write(&memory, b"in memory").unwrap();
    os::write(&a, b"before").unwrap();
    send_files(&a, b"one", &[&r, &file], None);
    send_files(&a, b"two", &[&event, &timer, &memory], None);
    os::write(&a, b"after").unwrap();
    // The file is held too; the others are nowhere but on their way.
    drop((r, event, timer, memory));
    os::write(&w, b"in the pipe").unwrap();
    cx.ready(|| receive(&b));
    let mut bytes = String::new();
    let mut files = Vec::new();
    for _ in 0..4 {
        let (data, mut some, _) = receive(&b);
        cx.check(
            some.is_empty() || data.contains(["one", "two"][usize::from(files.len() > 1)]),
            || format!("files with {data:?}"),
        );
        bytes += &data;
        files.append(&mut some);
        if bytes.len() == 17 {
            break;
        }
    }
    cx.same("bytes", bytes, "beforeonetwoafter".to_owned());
    let [r, same, event, timer, memory] = &files[..] else {
        return cx.fault(format!("{} files", files.len()));
    };
    cx.same(
        "the pipe",
        text(os::read_vec(r, 99)),
        "in the pipe".to_owned(),
    );
    let me = os::getpid();
    let is_same = os::same_file(me, file.as_raw_fd(), me, same.as_raw_fd());
    cx.check(is_same, || "not the same open file".to_owned());
    cx.same("the file", text(os::read_vec(&file, 3)), "456".to_owned());
    let count = os::read_vec(event, 8).ok();
    cx.same("the event", count, Some(7u64.to_ne_bytes().to_vec()));
    cx.same("the timer", os::fdinfo(timer, "clockid"), "1".to_owned());
    os::lseek(memory, 0, libc::SEEK_SET).unwrap();
    cx.same(
        "memory",
        text(os::read_vec(memory, 99)),
        "in memory".to_owned(),
    );
}

fn sockets_in_flight(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let (c, d) = os::socketpair(libc::SOCK_SEQPACKET);
    let (e, f) = os::socketpair(libc::SOCK_DGRAM);
    let (r, w) = os::pipe(0);
    // A pipe in a datagram socket in a packet socket in a stream.
    send_files(&e, b"pipe", &[&r], None);
    send_files(&c, b"datagrams", &[&f], None);
    send_files(&a, b"packets", &[&d], None);
    drop((r, f, d));
    os::write(&w, b"deep down").unwrap();
    // One that holds both its ends.
    let (g, h) = os::socketpair(libc::SOCK_STREAM);
    send_files(&g, b"itself", &[&h, &g], None);
    drop(g);
    // One that listens, with a connection.
    let listener = UnixListener::bind(cx.path("s")).unwrap();
    let client = UnixStream::connect(cx.path("s")).unwrap();
    send_files(&a, b"listener", &[&listener], None);
    drop(listener);
    cx.ready(|| receive(&b));
    let one = |by: &OwnedFd, says: &str| {
        let (data, mut files, _) = receive(by);
        cx.same("says", data, says.to_owned());
        files.pop()
    };
    let deep = one(&b, "packets")
        .and_then(|d| one(&d, "datagrams"))
        .and_then(|f| one(&f, "pipe"));
    match deep {
        Some(r) => cx.same("deep", text(os::read_vec(&r, 99)), "deep down".to_owned()),
        None => cx.fault("a file is missing"),
    }
    match one(&b, "listener") {
        Some(listener) => match accept(&listener) {
            Ok(server) => goes(cx, "to it", &client, &server),
            Err(e) => cx.fault(format!("accept: {e}")),
        },
        None => cx.fault("no listener"),
    }
    let (data, files, _) = receive(&h);
    cx.same("says", data, "itself".to_owned());
    match &files[..] {
        [h, g] => goes(cx, "to itself", g, h),
        other => cx.fault(format!("{} files in itself", other.len())),
    }
    drop((c, e));
}

fn datagram_files(cx: &Cx) {
    let server = UnixDatagram::bind(cx.path("server")).unwrap();
    let client = UnixDatagram::bind(cx.path("client")).unwrap();
    let (r, w) = os::pipe(0);
    let to = at_path(&cx.path("server"));
    client.send_to(b"plain", cx.path("server")).unwrap();
    send_files(&client, b"with", &[&r, &r], Some(&to));
    send_files(&client, b"", &[&w], Some(&to));
    drop((r, w));
    cx.ready(|| receive(&server));
    let (data, files, _) = receive(&server);
    cx.same("plain", (data, files.len()), ("plain".to_owned(), 0));
    let (data, ends, _) = receive(&server);
    cx.same("with", (data, ends.len()), ("with".to_owned(), 2));
    let (data, last, _) = receive(&server);
    cx.same("last", (data, last.len()), (String::new(), 1));
    if let (Some(r), Some(w)) = (ends.first(), last.first()) {
        os::write(w, b"through it").unwrap();
        cx.same(
            "the pipe",
            text(os::read_vec(r, 99)),
            "through it".to_owned(),
        );
    }
}

fn credentials(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_DGRAM);
    set_option(&b, libc::SO_PASSCRED, 1);
    let server = UnixListener::bind(cx.path("s")).unwrap();
    let client = UnixStream::connect(cx.path("s")).unwrap();
    let (accepted, _) = server.accept().unwrap();
    set_option(&accepted, libc::SO_PASSCRED, 1);
    let child = cx.child("sender", |cx| {
        os::write(&a, b"of the child").unwrap();
        os::write(&client, b"child").unwrap();
        cx.ready_unspoilt();
    });
    let me = os::getpid();
    let other = UnixCredentials::from(libc::ucred {
        pid: me,
        uid: 1000,
        gid: 1001,
    });
    let message = [ControlMessage::ScmCredentials(&other)];
    let data = [IoSlice::new(b"another user")];
    sendmsg::<UnixAddr>(a.as_raw_fd(), &data, &message, MsgFlags::empty(), None).unwrap();
    os::write(&client, b"parent").unwrap();
    cx.ready(|| receive(&b));
    let (data, _, who) = receive(&b);
    cx.same(
        "1",
        (data, who),
        ("of the child".to_owned(), Some([child, 0, 0])),
    );
    let (data, _, who) = receive(&b);
    cx.same(
        "2",
        (data, who),
        ("another user".to_owned(), Some([me, 1000, 1001])),
    );
    let (data, _, who) = receive(&accepted);
    cx.same("3", (data, who), ("child".to_owned(), Some([child, 0, 0])));
    let (data, _, who) = receive(&accepted);
    cx.same("4", (data, who), ("parent".to_owned(), Some([me, 0, 0])));
    os::write(&a, b"x").unwrap();
    cx.same("name of the sender", own(&a), Vec::new());
    cx.join("sender", child);
}

fn credentials_of_strangers(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_DGRAM);
    set_option(&b, libc::SO_PASSCRED, 1);
    let send = |pid, uid, gid, data: &str| {
        let who = UnixCredentials::from(libc::ucred { pid, uid, gid });
        let message = [ControlMessage::ScmCredentials(&who)];
        let data = [IoSlice::new(data.as_bytes())];
        sendmsg::<UnixAddr>(a.as_raw_fd(), &data, &message, MsgFlags::empty(), None).unwrap();
    };
    let (me, outside) = (os::getpid(), os::getppid());
    send(outside, 1000, 1001, "outside");
    let ended = os::fork_run(|| {
        send(os::getpid(), 1002, 1003, "ended");
        0
    });
    os::waitpid(ended, 0).unwrap();
    cx.ready(|| receive(&b));
    let (data, _, who) = receive(&b);
    let wanted = ("outside".to_owned(), Some([outside, 1000, 1001]));
    cx.same("1", (data, who), wanted);
    // No kernel knows the PID of a process that has ended: the receiver's stands for it.
    let (data, _, who) = receive(&b);
    let who = who.map(|[pid, uid, gid]| ([ended, me].contains(&pid), uid, gid));
    let wanted = ("ended".to_owned(), Some((true, 1002, 1003)));
    cx.same("2", (data, who), wanted);
}

fn options(cx: &Cx) {
    let listener = UnixListener::bind(cx.path("s")).unwrap();
    set_option(&listener, libc::SO_PASSCRED, 1);
    let client = UnixStream::connect(cx.path("s")).unwrap();
    let (server, _) = listener.accept().unwrap();
    set_option(&listener, libc::SO_PASSCRED, 0);
    set_option(&client, libc::SO_SNDBUF, 30_000);
    set_option(&client, libc::SO_MARK, 0x77);
    set_option(&client, libc::SO_PRIORITY, 4);
    set_option(&server, libc::SO_PEEK_OFF, 2);
    client
        .set_read_timeout(Some(std::time::Duration::from_millis(1500)))
        .unwrap();
    let datagram = UnixDatagram::bind(cx.path("d")).unwrap();
    // Only datagrams that begin with 'y'.
    let program = [
        libc::sock_filter {
            code: 0x30,
            jt: 0,
            jf: 0,
            k: 0,
        },
        libc::sock_filter {
            code: 0x15,
            jt: 0,
            jf: 1,
            k: u32::from(b'y'),
        },
        libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: 0xffff,
        },
        libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: 0,
        },
    ];
    let filter = libc::sock_fprog {
        len: 4,
        filter: program.as_ptr().cast_mut(),
    };
    let (level, attach) = (libc::SOL_SOCKET as usize, libc::SO_ATTACH_FILTER as usize);
    let args = [
        os::raw(&datagram),
        level,
        attach,
        os::at(&filter),
        size_of_val(&filter),
        0,
    ];
    os::syscall(libc::SYS_setsockopt, args).unwrap();
    set_option(&datagram, libc::SO_LOCK_FILTER, 1);
    let all = [
        libc::SO_PASSCRED,
        libc::SO_SNDBUF,
        libc::SO_RCVBUF,
        libc::SO_MARK,
        libc::SO_PRIORITY,
        libc::SO_PEEK_OFF,
        libc::SO_LOCK_FILTER,
        libc::SO_RCVLOWAT,
    ];
    let fds: [&dyn AsRawFd; 4] = [&listener, &client, &server, &datagram];
    let state = || {
        let of = |fd: &&dyn AsRawFd| {
            // SAFETY: borrowed for the call; the sockets live to the end of this function.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd.as_raw_fd()) };
            (
                all.map(|o| option(&fd, o)),
                raw_option::<4>(&fd, libc::SO_RCVTIMEO),
            )
        };
        fds.iter().map(of).collect::<Vec<_>>()
    };
    let was = state();
    cx.ready(|| set_option(&server, libc::SO_PASSCRED, 0));
    cx.same("options", state(), was);
    let sender = UnixDatagram::unbound().unwrap();
    let _ = sender.send_to(b"no", cx.path("d"));
    let _ = sender.send_to(b"yes", cx.path("d"));
    cx.same("through the filter", got(&datagram), "yes".to_owned());
}

fn many(cx: &Cx) {
    let listener = UnixListener::bind(cx.path("s")).unwrap();
    let child = |number: usize| {
        let name = format!("c{number}");
        let pid = cx.child(&name, |cx| {
            let all: Vec<_> = (0..25)
                .map(|i| {
                    let mut client = UnixStream::connect(cx.path("s")).unwrap();
                    client.write_all(&[number as u8, i]).unwrap();
                    client
                })
                .collect();
            cx.ready_unspoilt();
            for (i, client) in (0u8..).zip(&all) {
                let answer = os::read_vec(client, 9).unwrap_or_default();
                cx.same("answer", answer, vec![number as u8, i, 1]);
            }
        });
        (name, pid)
    };
    // Accepted as they come: the backlog is not that long.
    let mut servers = Vec::new();
    let children: Vec<_> = (0..4)
        .map(|number| {
            let made = child(number);
            for _ in 0..25 {
                servers.push(listener.accept().unwrap().0);
            }
            made
        })
        .collect();
    cx.ready(|| got(&servers[50]));
    for server in &servers {
        let mut both = got(server).into_bytes();
        both.push(1);
        let mut server = server;
        cx.check(server.write_all(&both).is_ok(), || {
            "cannot answer".to_owned()
        });
    }
    for (name, pid) in children {
        cx.join(&name, pid);
    }
}

fn urgent(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    os::write(&a, b"before").unwrap();
    let flags = MsgFlags::MSG_OOB;
    nix::sys::socket::send(a.as_raw_fd(), b"!", flags).unwrap();
    let spoilt = Cell::new(b'!');
    cx.ready(|| spoilt.set(b'?'));
    let mut byte = [0];
    nix::sys::socket::recv(b.as_raw_fd(), &mut byte, flags).ok();
    cx.same("urgent", byte[0], spoilt.get());
    cx.same("before", got(&b), "before".to_owned());
}

fn bpf_filter(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_DGRAM);
    // BPF_PROG_TYPE_SOCKET_FILTER: r0 = 2 (keep two bytes), exit.
    let program = [0x2_0000_00b7u64, 0x95];
    let attr = [
        1 | (program.len() as u64) << 32,
        os::at(&program) as u64,
        c"GPL".as_ptr() as u64,
        0,
        0,
        0,
    ];
    let args = [5, os::at(&attr), size_of_val(&attr), 0, 0, 0];
    let program = os::fd_from(libc::SYS_bpf, args).unwrap();
    set_option(&b, libc::SO_ATTACH_BPF, program.as_raw_fd());
    drop(program);
    let spoilt = Cell::new("lo");
    cx.ready(|| spoilt.set("?"));
    os::write(&a, b"long").unwrap();
    cx.same("through the filter", got(&b), spoilt.get().to_owned());
}

fn epoll_in_flight(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let epoll = os::fd_from(libc::SYS_epoll_create1, [0; 6]).unwrap();
    send_files(&a, b"x", &[&epoll], None);
    drop(epoll);
    cx.ready(|| receive(&b));
    cx.same("files", receive(&b).1.len(), 1);
}

fn epoll_of_a_file_in_flight(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let event = os::fd_from(libc::SYS_eventfd2, [1, 0, 0, 0, 0, 0]).unwrap();
    let epoll = events::new_epoll();
    events::watch(&epoll, &event, libc::EPOLLIN, 5);
    send_files(&a, b"x", &[&event], None);
    drop(event);
    cx.ready(|| receive(&b));
    let ready = events::reported(&epoll);
    cx.same("ready", ready, vec![(5, libc::EPOLLIN)]);
}

fn inotify_in_flight(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let inotify = events::new_inotify();
    events::add_watch(&inotify, &cx.path("."), libc::IN_CREATE);
    send_files(&a, b"x", &[&inotify], None);
    drop(inotify);
    cx.ready(|| receive(&b));
    cx.same("files", receive(&b).1.len(), 1);
}

fn watched_in_flight(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let file = os::open(&cx.path("file"), libc::O_RDWR | libc::O_CREAT).unwrap();
    let inotify = events::new_inotify();
    let wd = events::add_watch(&inotify, &cx.path("file"), libc::IN_MODIFY);
    fs::remove_file(cx.path("file")).unwrap();
    send_files(&a, b"x", &[&file], None);
    drop(file);
    cx.ready(|| receive(&b));
    let (_, files, _) = receive(&b);
    match files.first() {
        Some(file) => os::write(file, b"x").map(drop).unwrap(),
        None => cx.fault("no file"),
    }
    let told = events::told(&inotify);
    cx.same("events", told, vec![(wd, libc::IN_MODIFY, String::new())]);
}

fn fanotify_in_flight(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let group = events::new_fanotify(0);
    send_files(&a, b"x", &[&group], None);
    drop(group);
    cx.ready(|| receive(&b));
    cx.same("files", receive(&b).1.len(), 1);
}
