//! What nobody promised to carry: each has to come back whole, or be refused by name with the program unharmed.
//!
//! Not here, because no interface of the kernel shows it to anyone: a Landlock domain (lost, without a word).
use super::os::{self, PAGE, Region};
use super::{Cx, Need, Program};
use std::os::fd::{AsRawFd, OwnedFd};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new("io_uring", "an io_uring", io_uring).refused("io_uring is not supported"),
    Program::new(
        "io_uring_mapped",
        "an io_uring with its rings mapped",
        io_uring_mapped,
    )
    .refused("an io_uring ring is not supported"),
    Program::new(
        "userfaultfd_device",
        "the device for userfaultfds",
        userfaultfd_device,
    )
    .refused("userfaultfd (/dev/userfaultfd) is not supported")
    .needs(&[USERFAULTFD_DEVICE]),
    Program::new("tun", "the device for TUN and TAP interfaces", tun)
        .refused("TUN/TAP (/dev/net/tun) is not supported")
        .needs(&[TUN]),
    Program::new("tap", "a TAP interface", tap)
        .refused("TUN/TAP (/dev/net/tun) is not supported")
        .needs(&[TUN]),
    Program::new("fuse", "the device of FUSE", fuse)
        .refused("FUSE (/dev/fuse) is not supported")
        .needs(&[FUSE]),
    Program::new("kvm", "the device of KVM", kvm)
        .refused("KVM (/dev/kvm) is not supported")
        .needs(&[KVM]),
    Program::new(
        "kvm_machine",
        "a virtual machine of KVM, its device closed",
        kvm_machine,
    )
    .refused("a KVM virtual machine is not supported")
    .needs(&[KVM_MACHINE]),
    Program::new(
        "userfaultfd",
        "a userfaultfd with a registered range",
        userfaultfd,
    )
    .carried_or_refused("userfaultfd"),
    Program::new("perf_event", "a perf event", perf_event)
        .carried_or_refused("perf")
        .needs(&[PERF]),
    Program::new("bpf_map", "a BPF map", bpf_map)
        .carried_or_refused("bpf")
        .needs(&[BPF]),
    Program::new("bpf_map_mapped", "a BPF map that is mapped", bpf_map_mapped)
        .carried_or_refused("bpf")
        .needs(&[BPF]),
    Program::new("tcp_listening", "a listening TCP socket", tcp_listening)
        .carried_or_refused("socket"),
    Program::new(
        "tcp_established",
        "both ends of a TCP connection",
        tcp_established,
    )
    .carried_or_refused("tcp"),
    Program::new("udp", "a bound UDP socket", udp).carried_or_refused("socket"),
    Program::new("netlink", "a netlink socket", netlink).carried_or_refused("socket"),
    Program::new("packet", "a packet socket", packet).carried_or_refused("socket"),
    Program::new("vsock", "a vsock socket", vsock)
        .refused("vsock sockets")
        .needs(&[VSOCK]),
    Program::new(
        "unix_listening",
        "a listening unix socket with a name",
        unix_listening,
    )
    .carried_or_refused("socket"),
    Program::new(
        "unix_named_pair",
        "unix datagram sockets with names",
        unix_named_pair,
    )
    .carried_or_refused("socket"),
    Program::new(
        "pseudo_terminal",
        "both ends of a pseudo-terminal",
        pseudo_terminal,
    )
    .carried_or_refused("terminal"),
    Program::new("kmsg", "/dev/kmsg", kmsg).carried_or_refused("kmsg"),
    Program::new(
        "host_name_space",
        "a UTS namespace of its own",
        host_name_space,
    )
    .carried_or_refused("namespace"),
    Program::new("user_space", "a user namespace of its own", user_space)
        .carried_or_refused("namespace"),
    Program::new("traced_child", "a child traced by its parent", traced_child)
        .carried_or_refused("trac"),
    Program::new(
        "pidfd_outside",
        "a pidfd of a process outside the tree",
        pidfd_outside,
    )
    .carried_or_refused("pidfd"),
];

const VSOCK: Need = Need {
    what: "kernel option CONFIG_VSOCKETS",
    here: || new_vsock().is_ok(),
};
const TUN: Need = Need {
    what: "kernel option CONFIG_TUN",
    here: || device("/dev/net/tun").is_ok(),
};
const FUSE: Need = Need {
    what: "kernel option CONFIG_FUSE_FS",
    here: || device("/dev/fuse").is_ok(),
};
const USERFAULTFD_DEVICE: Need = Need {
    what: "kernel option CONFIG_USERFAULTFD (Linux 6.1)",
    here: || device("/dev/userfaultfd").is_ok(),
};
const KVM: Need = Need {
    what: "kernel option CONFIG_KVM",
    here: || device("/dev/kvm").is_ok(),
};
const KVM_MACHINE: Need = Need {
    what: "virtualization by KVM",
    here: || new_machine().is_ok(),
};
const PERF: Need = Need {
    what: "kernel option CONFIG_PERF_EVENTS",
    here: || new_perf_event().is_ok(),
};
pub(super) const BPF: Need = Need {
    what: "kernel option CONFIG_BPF_SYSCALL",
    here: || new_bpf_map().is_ok(),
};

/// A flag the damage clears, for what has no state to spoil.
fn good(cx: &Cx) -> bool {
    let flag = std::cell::Cell::new(true);
    cx.ready(|| flag.set(false));
    flag.get()
}

fn io_uring(cx: &Cx) {
    let parameters = [0u32; 30];
    let ring = os::fd_from(
        libc::SYS_io_uring_setup,
        [4, os::at(&parameters), 0, 0, 0, 0],
    )
    .unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    let entered = os::syscall(libc::SYS_io_uring_enter, [os::raw(&ring), 0, 0, 0, 0, 0]);
    cx.check(entered.is_ok(), || format!("io_uring_enter: {entered:?}"));
}

fn io_uring_mapped(cx: &Cx) {
    let mut parameters = [0u32; 30];
    let args = [4, os::at_mut(&mut parameters), 0, 0, 0, 0];
    let ring = os::fd_from(libc::SYS_io_uring_setup, args).unwrap();
    let region = Region::file(&ring, PAGE, libc::MAP_SHARED);
    // The mapping alone: it keeps the rings.
    drop(ring);
    cx.check(good(cx), || "spoilt".to_owned());
    cx.check(region.smaps("Rss") != "0 kB", || "it is empty".to_owned());
}

fn device(path: &str) -> os::Result<OwnedFd> {
    os::open(path.as_ref(), libc::O_RDWR)
}

/// Has a device open, and finds it open.
fn has_open(cx: &Cx, path: &str) {
    let fd = device(path).unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    cx.same("its name", link.ok(), Some(path.into()));
}

fn userfaultfd_device(cx: &Cx) {
    has_open(cx, "/dev/userfaultfd");
}

fn tun(cx: &Cx) {
    has_open(cx, "/dev/net/tun");
}

fn fuse(cx: &Cx) {
    has_open(cx, "/dev/fuse");
}

fn kvm(cx: &Cx) {
    has_open(cx, "/dev/kvm");
}

fn tap(cx: &Cx) {
    const TUNSETIFF: usize = 0x4004_54ca;
    const TUNGETIFF: usize = 0x8004_54d2;
    const IFF_TAP: u8 = 2;
    let fd = device("/dev/net/tun").unwrap();
    // struct ifreq: name, flags.
    let mut request = [0u8; 40];
    request[..6].copy_from_slice(b"fftap%");
    request[6] = b'd';
    request[16] = IFF_TAP;
    let args = [os::raw(&fd), TUNSETIFF, os::at_mut(&mut request), 0, 0, 0];
    os::syscall(libc::SYS_ioctl, args).unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    let mut now = [0u8; 40];
    let args = [os::raw(&fd), TUNGETIFF, os::at_mut(&mut now), 0, 0, 0];
    os::syscall(libc::SYS_ioctl, args).ok();
    cx.same("its name", &now[..16], &request[..16]);
}

fn new_machine() -> os::Result<OwnedFd> {
    const KVM_CREATE_VM: usize = 0xae01;
    let fd = device("/dev/kvm")?;
    os::fd_from(libc::SYS_ioctl, [os::raw(&fd), KVM_CREATE_VM, 0, 0, 0, 0])
}

fn kvm_machine(cx: &Cx) {
    const KVM_CHECK_EXTENSION: usize = 0xae03;
    let fd = new_machine().unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    let asked = os::syscall(
        libc::SYS_ioctl,
        [os::raw(&fd), KVM_CHECK_EXTENSION, 3, 0, 0, 0],
    );
    cx.check(asked.is_ok(), || format!("KVM_CHECK_EXTENSION: {asked:?}"));
}

fn userfaultfd(cx: &Cx) {
    const UFFDIO_API: usize = 0xc018_aa3f;
    const UFFDIO_REGISTER: usize = 0xc020_aa00;
    let fd = os::fd_from(
        libc::SYS_userfaultfd,
        [libc::O_NONBLOCK as usize, 0, 0, 0, 0, 0],
    )
    .unwrap();
    let mut api = [0xaau64, 0, 0];
    os::syscall(
        libc::SYS_ioctl,
        [os::raw(&fd), UFFDIO_API, os::at_mut(&mut api), 0, 0, 0],
    )
    .unwrap();
    let region = Region::anon(4 * PAGE);
    let mut range = [region.addr as u64, region.len as u64, 1, 0];
    os::syscall(
        libc::SYS_ioctl,
        [
            os::raw(&fd),
            UFFDIO_REGISTER,
            os::at_mut(&mut range),
            0,
            0,
            0,
        ],
    )
    .unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.check(region.smaps("VmFlags").contains("um"), || {
        "the range is no longer registered".to_owned()
    });
}

fn new_perf_event() -> os::Result<OwnedFd> {
    let mut attr = [0u64; 16];
    attr[0] = 1 | 128 << 32; // PERF_TYPE_SOFTWARE, size
    os::fd_from(
        libc::SYS_perf_event_open,
        [os::at(&attr), 0, usize::MAX, usize::MAX, 0, 0],
    )
}

fn perf_event(cx: &Cx) {
    let fd = new_perf_event().unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.same(
        "bytes of a count",
        os::read_vec(&fd, 8).map(|v| v.len()).ok(),
        Some(8),
    );
}

fn new_bpf_map() -> os::Result<OwnedFd> {
    bpf_map_of(4, 0)
}

fn bpf_map_of(entries: u32, flags: u32) -> os::Result<OwnedFd> {
    // BPF_MAP_TYPE_ARRAY, key 4, value 8.
    let attr = [2u32, 4, 8, entries, flags, 0, 0, 0, 0, 0, 0, 0];
    os::fd_from(
        libc::SYS_bpf,
        [0, os::at(&attr), size_of_val(&attr), 0, 0, 0],
    )
}

/// BPF_MAP_LOOKUP_ELEM (1) or BPF_MAP_UPDATE_ELEM (2) of the second entry.
fn bpf_element(fd: &OwnedFd, what: usize, value: &mut u64) -> os::Result<i64> {
    let key = 1u32;
    let number = u64::from(fd.as_raw_fd() as u32);
    let attr = [number, os::at(&key) as u64, os::at_mut(value) as u64, 0];
    let args = [what, os::at(&attr), size_of_val(&attr), 0, 0, 0];
    os::syscall(libc::SYS_bpf, args)
}

fn bpf_map(cx: &Cx) {
    let fd = new_bpf_map().unwrap();
    let (mut value, mut found) = (4711u64, 0u64);
    bpf_element(&fd, 2, &mut value).unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    bpf_element(&fd, 1, &mut found).ok();
    cx.same("value", found, 4711);
}

fn bpf_map_mapped(cx: &Cx) {
    const MMAPABLE: u32 = 1 << 10;
    let fd = bpf_map_of(512, MMAPABLE).unwrap();
    let region = Region::file(&fd, PAGE, libc::MAP_SHARED);
    let mut value = 4711u64;
    bpf_element(&fd, 2, &mut value).unwrap();
    cx.ready(|| region.set(8, 0));
    let mut found = 0;
    bpf_element(&fd, 1, &mut found).ok();
    cx.same("value", found, 4711);
    cx.same("what is mapped", region.get(8), 4711u64.to_ne_bytes()[0]);
    region.set(8, 1);
    bpf_element(&fd, 1, &mut found).ok();
    cx.same("value written there", found, 4711 - 103 + 1);
}

fn tcp_listening(cx: &Cx) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.same("address", listener.local_addr().ok(), Some(address));
    let client = std::net::TcpStream::connect(address);
    cx.check(client.is_ok() && listener.accept().is_ok(), || {
        format!("connect: {client:?}")
    });
}

fn tcp_established(cx: &Cx) {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut server = listener.accept().unwrap().0;
    drop(listener);
    client.write_all(b"queued").unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    let mut buffer = [0u8; 6];
    cx.check(
        server.read_exact(&mut buffer).is_ok() && &buffer == b"queued",
        || format!("got {buffer:?}"),
    );
    cx.check(server.write_all(b"answer").is_ok(), || {
        "cannot write".to_owned()
    });
    cx.check(
        client.read_exact(&mut buffer).is_ok() && &buffer == b"answer",
        || format!("got {buffer:?}"),
    );
}

fn udp(cx: &Cx) {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    socket.set_nonblocking(true).unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.same("address", socket.local_addr().ok(), Some(address));
    socket.send_to(b"self", address).ok();
    let mut buffer = [0u8; 16];
    cx.same(
        "bytes",
        socket.recv_from(&mut buffer).map(|r| r.0).ok(),
        Some(4),
    );
}

fn socket(domain: i32, kind: i32, protocol: i32) -> OwnedFd {
    os::fd_from(
        libc::SYS_socket,
        [domain as usize, kind as usize, protocol as usize, 0, 0, 0],
    )
    .unwrap()
}

fn netlink(cx: &Cx) {
    let fd = socket(libc::AF_NETLINK, libc::SOCK_RAW, 0);
    let address = [libc::AF_NETLINK as u32, 0, 0];
    os::syscall(
        libc::SYS_bind,
        [os::raw(&fd), os::at(&address), 12, 0, 0, 0],
    )
    .unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    // RTM_GETLINK of everything.
    let request = [20u32, 18 | 0x301 << 16, 1, 0, 0x11];
    cx.same("request", os::write(&fd, as_bytes(&request)).ok(), Some(20));
    cx.check(os::read_vec(&fd, 65536).is_ok_and(|v| v.len() > 20), || {
        "no answer".to_owned()
    });
}

fn as_bytes(words: &[u32; 5]) -> &[u8] {
    // SAFETY: any words are bytes.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), 20) }
}

fn packet(cx: &Cx) {
    let fd = socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, 0);
    let state = || {
        (
            os::flags(&fd),
            std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).is_ok(),
        )
    };
    let was = state();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.same("flags", state(), was);
}

fn new_vsock() -> os::Result<OwnedFd> {
    let args = [
        libc::AF_VSOCK as usize,
        libc::SOCK_STREAM as usize,
        0,
        0,
        0,
        0,
    ];
    os::fd_from(libc::SYS_socket, args)
}

fn vsock(cx: &Cx) {
    let fd = new_vsock().unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.check(os::flags(&fd) >= 0, || "it is gone".to_owned());
}

fn unix_listening(cx: &Cx) {
    use std::os::unix::net::{UnixListener, UnixStream};
    let path = cx.path("socket");
    let listener = UnixListener::bind(&path).unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    let client = UnixStream::connect(&path);
    cx.check(client.is_ok() && listener.accept().is_ok(), || {
        format!("connect: {client:?}")
    });
}

fn unix_named_pair(cx: &Cx) {
    use std::os::unix::net::UnixDatagram;
    let (one, two) = (
        UnixDatagram::bind(cx.path("one")).unwrap(),
        UnixDatagram::bind(cx.path("two")).unwrap(),
    );
    one.connect(cx.path("two")).unwrap();
    one.send(b"queued").unwrap();
    two.set_nonblocking(true).unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    let mut buffer = [0u8; 16];
    cx.same("bytes", two.recv(&mut buffer).ok(), Some(6));
    cx.same(
        "address",
        one.local_addr()
            .ok()
            .and_then(|a| a.as_pathname().map(Into::into)),
        Some(cx.path("one")),
    );
    cx.check(
        one.send(b"more").is_ok() && two.recv(&mut buffer).is_ok(),
        || "not connected".to_owned(),
    );
}

fn pseudo_terminal(cx: &Cx) {
    let pty = nix::pty::openpty(None, None).unwrap();
    os::fcntl(&pty.slave, libc::F_SETFL, libc::O_NONBLOCK as usize).unwrap();
    os::write(&pty.master, b"typed\n").unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.same(
        "what was typed",
        os::read_vec(&pty.slave, 99).ok(),
        Some(b"typed\n".to_vec()),
    );
    cx.check(os::write(&pty.slave, b"x").is_ok(), || {
        "cannot write".to_owned()
    });
}

fn kmsg(cx: &Cx) {
    let file = os::open("/dev/kmsg".as_ref(), libc::O_RDONLY | libc::O_NONBLOCK).unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.same(
        "flags",
        os::flags(&file) & libc::O_NONBLOCK,
        libc::O_NONBLOCK,
    );
}

fn host_name_space(cx: &Cx) {
    os::syscall(
        libc::SYS_unshare,
        [libc::CLONE_NEWUTS as usize, 0, 0, 0, 0, 0],
    )
    .unwrap();
    let name = |text: &[u8]| {
        os::syscall(
            libc::SYS_sethostname,
            [os::at(text), text.len(), 0, 0, 0, 0],
        )
        .unwrap()
    };
    name(b"frozen");
    cx.ready(|| name(b"spoilt"));
    let now = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    cx.same("host name", now, "frozen\n".to_owned());
}

fn user_space(cx: &Cx) {
    os::syscall(
        libc::SYS_unshare,
        [libc::CLONE_NEWUSER as usize, 0, 0, 0, 0, 0],
    )
    .unwrap();
    let ids = || {
        (
            std::fs::read_to_string("/proc/self/uid_map").unwrap(),
            os::status_line("self", "Uid"),
        )
    };
    let was = ids();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.same("map and ids", ids(), was);
}

fn traced_child(cx: &Cx) {
    let child = os::fork_run(|| {
        loop {
            os::sleep_ms(100);
        }
    });
    const PTRACE_SEIZE: usize = 0x4206;
    os::syscall(libc::SYS_ptrace, [PTRACE_SEIZE, child as usize, 0, 0, 0, 0]).unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.same(
        "its tracer",
        os::status_line(&child.to_string(), "TracerPid"),
        os::getpid().to_string(),
    );
    os::kill(child, libc::SIGKILL);
    os::waitpid(child, 0).unwrap();
}

fn pidfd_outside(cx: &Cx) {
    let outside = os::getppid();
    let fd = os::fd_from(libc::SYS_pidfd_open, [outside as usize, 0, 0, 0, 0, 0]).unwrap();
    cx.check(good(cx), || "spoilt".to_owned());
    cx.same("whose it is", os::fdinfo(&fd, "Pid"), outside.to_string());
}
