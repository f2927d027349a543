//! Options of sockets: those that are not as a new socket's.

use freezeframe_error::Result;
use freezeframe_inject::Arg;
use freezeframe_sys::fd::{getsockopt, new_socket, socket_filter};

use super::{Base, SOL};
use crate::bytes::Bytes;
use crate::cx::{FileView, RestoreFiles};

/// SO_BUF_LOCK (Linux 5.14): which buffer sizes the program has set.
pub(in crate::file) const SO_BUF_LOCK: i32 = 72;

/// Options of SOL_SOCKET that libc lacks, or has for other ABIs.
const SO_TIMESTAMP_NEW: i32 = 63;
const SO_TIMESTAMPNS_NEW: i32 = 64;
const SO_TIMESTAMPING_NEW: i32 = 65;
const SO_PREFER_BUSY_POLL: i32 = 69;
const SO_BUSY_POLL_BUDGET: i32 = 70;
const SO_RCVMARK: i32 = 75;
const SO_RCVPRIORITY: i32 = 82;

/// Options set before the socket has an address, in this order.
const EARLY: [(i32, i32); 138] = [
    (SOL, libc::SO_REUSEPORT),
    (SOL, libc::SO_BINDTODEVICE),
    (SOL, libc::SO_MARK),
    (SOL, libc::SO_KEEPALIVE),
    (SOL, libc::SO_BROADCAST),
    (SOL, libc::SO_OOBINLINE),
    (SOL, libc::SO_LINGER),
    (SOL, libc::SO_RCVTIMEO),
    (SOL, libc::SO_SNDTIMEO),
    (SOL, libc::SO_DONTROUTE),
    (SOL, libc::SO_TIMESTAMP),
    (SOL, libc::SO_TIMESTAMPNS),
    (SOL, libc::SO_TIMESTAMPING),
    (SOL, SO_TIMESTAMP_NEW),
    (SOL, SO_TIMESTAMPNS_NEW),
    (SOL, SO_TIMESTAMPING_NEW),
    (SOL, libc::SO_NO_CHECK),
    (SOL, libc::SO_BUSY_POLL),
    (SOL, SO_PREFER_BUSY_POLL),
    (SOL, SO_BUSY_POLL_BUDGET),
    (SOL, libc::SO_MAX_PACING_RATE),
    (SOL, libc::SO_SELECT_ERR_QUEUE),
    (SOL, libc::SO_RXQ_OVFL),
    (SOL, libc::SO_ZEROCOPY),
    (SOL, SO_RCVMARK),
    (SOL, SO_RCVPRIORITY),
    (SOL, libc::SO_PASSCRED),
    (SOL, libc::SO_PASSSEC),
    (SOL, libc::SO_TXTIME),
    (libc::SOL_IP, libc::IP_OPTIONS),
    (libc::SOL_IP, libc::IP_HDRINCL),
    (libc::SOL_IP, libc::IP_PASSSEC),
    (libc::SOL_IP, libc::IP_TOS),
    (libc::SOL_IP, libc::IP_TTL),
    (libc::SOL_IP, libc::IP_RECVTTL),
    (libc::SOL_IP, libc::IP_RECVTOS),
    (libc::SOL_IP, libc::IP_PKTINFO),
    (libc::SOL_IP, libc::IP_RECVOPTS),
    (libc::SOL_IP, libc::IP_RETOPTS),
    (libc::SOL_IP, libc::IP_RECVERR),
    (libc::SOL_IP, libc::IP_MTU_DISCOVER),
    (libc::SOL_IP, libc::IP_FREEBIND),
    (libc::SOL_IP, libc::IP_TRANSPARENT),
    (libc::SOL_IP, libc::IP_MINTTL),
    (libc::SOL_IP, libc::IP_NODEFRAG),
    (libc::SOL_IP, libc::IP_CHECKSUM),
    (libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (libc::SOL_IP, libc::IP_RECVFRAGSIZE),
    (libc::SOL_IP, IP_RECVERR_RFC4884),
    (libc::SOL_IP, libc::IP_MULTICAST_TTL),
    (libc::SOL_IP, libc::IP_MULTICAST_LOOP),
    (libc::SOL_IP, libc::IP_MULTICAST_IF),
    (libc::SOL_IP, libc::IP_MULTICAST_ALL),
    (libc::SOL_IP, libc::IP_UNICAST_IF),
    (libc::SOL_IP, libc::IP_RECVORIGDSTADDR),
    (libc::SOL_IP, IP_LOCAL_PORT_RANGE),
    (libc::SOL_IPV6, libc::IPV6_V6ONLY),
    (libc::SOL_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::SOL_IPV6, libc::IPV6_MULTICAST_HOPS),
    (libc::SOL_IPV6, libc::IPV6_MULTICAST_LOOP),
    (libc::SOL_IPV6, libc::IPV6_MULTICAST_IF),
    (libc::SOL_IPV6, libc::IPV6_MULTICAST_ALL),
    (libc::SOL_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::SOL_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::SOL_IPV6, libc::IPV6_RECVTCLASS),
    (libc::SOL_IPV6, libc::IPV6_RECVRTHDR),
    (libc::SOL_IPV6, libc::IPV6_RECVHOPOPTS),
    (libc::SOL_IPV6, libc::IPV6_RECVDSTOPTS),
    (libc::SOL_IPV6, libc::IPV6_RECVPATHMTU),
    (libc::SOL_IPV6, libc::IPV6_TCLASS),
    (libc::SOL_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::SOL_IPV6, libc::IPV6_RECVERR),
    (libc::SOL_IPV6, IPV6_RECVERR_RFC4884),
    (libc::SOL_IPV6, libc::IPV6_RECVORIGDSTADDR),
    (libc::SOL_IPV6, libc::IPV6_RECVFRAGSIZE),
    (libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
    (libc::SOL_IPV6, libc::IPV6_FREEBIND),
    (libc::SOL_IPV6, libc::IPV6_MINHOPCOUNT),
    (libc::SOL_IPV6, libc::IPV6_DONTFRAG),
    (libc::SOL_IPV6, libc::IPV6_AUTOFLOWLABEL),
    (libc::SOL_IPV6, libc::IPV6_ADDR_PREFERENCES),
    (libc::SOL_IPV6, libc::IPV6_UNICAST_IF),
    (libc::SOL_IPV6, libc::IPV6_FLOWINFO_SEND),
    (libc::SOL_IPV6, libc::IPV6_HOPOPTS),
    (libc::SOL_IPV6, libc::IPV6_RTHDRDSTOPTS),
    (libc::SOL_IPV6, libc::IPV6_RTHDR),
    (libc::SOL_IPV6, libc::IPV6_DSTOPTS),
    (libc::SOL_IPV6, libc::IPV6_2292PKTINFO),
    (libc::SOL_IPV6, libc::IPV6_2292HOPOPTS),
    (libc::SOL_IPV6, libc::IPV6_2292DSTOPTS),
    (libc::SOL_IPV6, libc::IPV6_2292RTHDR),
    (libc::SOL_IPV6, libc::IPV6_2292HOPLIMIT),
    (libc::SOL_IPV6, libc::IPV6_CHECKSUM),
    (libc::SOL_IPV6, IPV6_HDRINCL),
    (libc::SOL_RAW, ICMP_FILTER),
    (SOL_ICMPV6, ICMP_FILTER),
    (libc::SOL_TCP, libc::TCP_NODELAY),
    (libc::SOL_TCP, libc::TCP_KEEPIDLE),
    (libc::SOL_TCP, libc::TCP_KEEPINTVL),
    (libc::SOL_TCP, libc::TCP_KEEPCNT),
    (libc::SOL_TCP, libc::TCP_SYNCNT),
    (libc::SOL_TCP, libc::TCP_LINGER2),
    (libc::SOL_TCP, libc::TCP_DEFER_ACCEPT),
    (libc::SOL_TCP, libc::TCP_CONGESTION),
    (libc::SOL_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS),
    (libc::SOL_TCP, libc::TCP_THIN_DUPACK),
    (libc::SOL_TCP, libc::TCP_USER_TIMEOUT),
    (libc::SOL_TCP, libc::TCP_FASTOPEN),
    (libc::SOL_TCP, libc::TCP_NOTSENT_LOWAT),
    (libc::SOL_TCP, libc::TCP_SAVE_SYN),
    (libc::SOL_TCP, libc::TCP_FASTOPEN_NO_COOKIE),
    (libc::SOL_TCP, libc::TCP_INQ),
    (libc::SOL_TCP, TCP_TX_DELAY),
    (libc::SOL_UDP, libc::UDP_SEGMENT),
    (libc::SOL_UDP, libc::UDP_GRO),
    (libc::SOL_UDP, libc::UDP_NO_CHECK6_TX),
    (libc::SOL_UDP, libc::UDP_NO_CHECK6_RX),
    (SOL_UDPLITE, UDPLITE_SEND_CSCOV),
    (SOL_UDPLITE, UDPLITE_RECV_CSCOV),
    (libc::SOL_PACKET, libc::PACKET_AUXDATA),
    (libc::SOL_PACKET, libc::PACKET_ORIGDEV),
    (libc::SOL_PACKET, libc::PACKET_VERSION),
    (libc::SOL_PACKET, libc::PACKET_RESERVE),
    (libc::SOL_PACKET, libc::PACKET_LOSS),
    (libc::SOL_PACKET, libc::PACKET_VNET_HDR),
    (libc::SOL_PACKET, PACKET_VNET_HDR_SZ),
    (libc::SOL_PACKET, libc::PACKET_TIMESTAMP),
    (libc::SOL_PACKET, PACKET_TX_HAS_OFF),
    (libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS),
    (libc::SOL_PACKET, PACKET_IGNORE_OUTGOING),
    (libc::SOL_NETLINK, libc::NETLINK_PKTINFO),
    (libc::SOL_NETLINK, libc::NETLINK_BROADCAST_ERROR),
    (libc::SOL_NETLINK, libc::NETLINK_NO_ENOBUFS),
    (libc::SOL_NETLINK, libc::NETLINK_LISTEN_ALL_NSID),
    (libc::SOL_NETLINK, libc::NETLINK_CAP_ACK),
    (libc::SOL_NETLINK, libc::NETLINK_EXT_ACK),
    (libc::SOL_NETLINK, libc::NETLINK_GET_STRICT_CHK),
    // Behind those of which it follows.
    (SOL, libc::SO_PRIORITY),
];
const IP_RECVERR_RFC4884: i32 = 26;
const IPV6_RECVERR_RFC4884: i32 = 31;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const TCP_TX_DELAY: i32 = 37;
const IPV6_HDRINCL: i32 = 36;
const SOL_ICMPV6: i32 = libc::IPPROTO_ICMPV6;
/// Of SOL_RAW and of SOL_ICMPV6 the same number.
const ICMP_FILTER: i32 = 1;
const SOL_UDPLITE: i32 = libc::IPPROTO_UDPLITE;
const UDPLITE_SEND_CSCOV: i32 = 10;
const UDPLITE_RECV_CSCOV: i32 = 11;
const PACKET_TX_HAS_OFF: i32 = 19;
const PACKET_IGNORE_OUTGOING: i32 = 23;
const PACKET_VNET_HDR_SZ: i32 = 24;

/// Options set when everything else is done.
const LATE: [(i32, i32); 6] = [
    (SOL, libc::SO_RCVLOWAT),
    (SOL, libc::SO_PEEK_OFF),
    (SOL, libc::SO_LOCK_FILTER),
    (libc::SOL_TCP, libc::TCP_CORK),
    (libc::SOL_TCP, libc::TCP_FASTOPEN_CONNECT),
    (libc::SOL_UDP, libc::UDP_CORK),
];

/// Options that have another value than those of a new socket.
pub(in crate::file) fn differing(
    file: &FileView<'_>,
    (domain, kind, protocol): (i32, i32, i32),
) -> Result<Vec<(i32, i32, Bytes)>> {
    let ours = file.ours()?;
    let is_ip = matches!(domain, libc::AF_INET | libc::AF_INET6);
    let is_udp = is_ip && matches!(protocol, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE);
    let new = match new_socket(domain, kind, protocol) {
        // One of ping, which our group may not make: as one of UDP.
        Err(e) if e.errno() == Some(libc::EACCES) && kind == libc::SOCK_DGRAM => {
            new_socket(domain, kind, 0)?
        }
        other => other?,
    };
    let mut found = Vec::new();
    for (level, option) in EARLY.into_iter().chain(LATE) {
        let its_own = match level {
            SOL => true,
            libc::SOL_IP => is_ip,
            libc::SOL_IPV6 => domain == libc::AF_INET6,
            libc::SOL_TCP => is_ip && protocol == libc::IPPROTO_TCP,
            libc::SOL_UDP => is_udp,
            SOL_UDPLITE => is_ip && protocol == libc::IPPROTO_UDPLITE,
            libc::SOL_RAW | SOL_ICMPV6 => is_ip && kind == libc::SOCK_RAW,
            libc::SOL_PACKET => domain == libc::AF_PACKET,
            libc::SOL_NETLINK => domain == libc::AF_NETLINK,
            _ => false,
        };
        // Of a connection they are leftovers of its first packet.
        if !its_own || (kind == libc::SOCK_STREAM && is_multicast(level, option)) {
            continue;
        }
        // Those that this kernel, or this kind of socket, does not know are equal.
        let room = room(level, option);
        let value = getsockopt(ours, level, option, room).ok();
        if let Some(value) = value
            && !getsockopt(&new, level, option, room).is_ok_and(|v| v == value)
        {
            found.push((level, option, Bytes(value)));
        }
    }
    Ok(found)
}

/// How long its value may be.
fn room(level: i32, option: i32) -> usize {
    use libc::{IPV6_DSTOPTS, IPV6_HOPOPTS, IPV6_RTHDR, IPV6_RTHDRDSTOPTS};
    const HEADERS: [i32; 4] = [IPV6_DSTOPTS, IPV6_HOPOPTS, IPV6_RTHDR, IPV6_RTHDRDSTOPTS];
    match level == libc::SOL_IPV6 && HEADERS.contains(&option) {
        true => 2048,
        false => 64,
    }
}

fn is_multicast(level: i32, option: i32) -> bool {
    use libc::{IP_MULTICAST_ALL, IP_MULTICAST_IF, IP_MULTICAST_LOOP, IP_MULTICAST_TTL};
    use libc::{IPV6_MULTICAST_ALL, IPV6_MULTICAST_HOPS, IPV6_MULTICAST_IF, IPV6_MULTICAST_LOOP};
    const IP: [i32; 4] = [
        IP_MULTICAST_ALL,
        IP_MULTICAST_IF,
        IP_MULTICAST_LOOP,
        IP_MULTICAST_TTL,
    ];
    const IPV6: [i32; 4] = [
        IPV6_MULTICAST_ALL,
        IPV6_MULTICAST_HOPS,
        IPV6_MULTICAST_IF,
        IPV6_MULTICAST_LOOP,
    ];
    match level {
        libc::SOL_IP => IP.contains(&option),
        libc::SOL_IPV6 => IPV6.contains(&option),
        _ => false,
    }
}

/// The classic BPF program it has; one of another kind is refused.
pub(in crate::file) fn filter(file: &FileView<'_>) -> Result<Vec<u8>> {
    match socket_filter(file.ours()?) {
        Ok(program) => Ok(program.concat()),
        Err(e) if e.errno() == Some(libc::EACCES) => {
            Err(file.refuse("a socket with an eBPF filter is not supported"))
        }
        Err(e) => Err(file.blame(e)),
    }
}

/// Appends setsockopt(2).
pub(in crate::file) fn set(
    cx: &mut RestoreFiles<'_>,
    socket: Arg,
    level: i32,
    option: i32,
    value: &[u8],
) -> freezeframe_inject::OpRef {
    let data = cx.batch.data(value);
    let args = [
        socket,
        level.into(),
        option.into(),
        data.into(),
        value.len().into(),
    ];
    let name = format!("setsockopt({level}, {option})");
    cx.batch.call(name, libc::SYS_setsockopt, args)
}

/// The same for an `int`.
pub(in crate::file) fn set_int(
    cx: &mut RestoreFiles<'_>,
    socket: Arg,
    (level, option): (i32, i32),
    value: i32,
) -> freezeframe_inject::OpRef {
    set(cx, socket, level, option, &value.to_ne_bytes())
}

/// Whether an option is set at the end.
pub(in crate::file) fn is_late(level: i32, option: i32) -> bool {
    LATE.contains(&(level, option))
}

/// Sets what has to be there before the socket has an address.
pub(in crate::file) fn set_early(cx: &mut RestoreFiles<'_>, socket: Arg, base: &Base) {
    for (level, option, value) in base.options.iter().filter(|(l, o, _)| !is_late(*l, *o)) {
        set(cx, socket, *level, *option, value);
    }
    if !base.filter.is_empty() {
        let program = cx.batch.data(&base.filter);
        // struct sock_fprog: how many instructions, and where.
        let mut fprog = [0; 16];
        fprog[..2].copy_from_slice(&((base.filter.len() / 8) as u16).to_ne_bytes());
        let fprog = cx.batch.data(&fprog);
        cx.batch.pointer(fprog.at(8), program);
        let args = [
            socket,
            SOL.into(),
            libc::SO_ATTACH_FILTER.into(),
            fprog.into(),
            16.into(),
        ];
        let name = "setsockopt(SO_ATTACH_FILTER)";
        cx.batch.call(name, libc::SYS_setsockopt, args);
    }
}

/// The buffer sizes, and whether they are the program's: option and value. The
/// kernel doubles what it is given.
pub(in crate::file) fn sizes(base: &Base) -> [(i32, i32); 3] {
    let [send, receive, lock] = base.buffers;
    [
        (libc::SO_SNDBUFFORCE, send / 2),
        (libc::SO_RCVBUFFORCE, receive / 2),
        (SO_BUF_LOCK, lock),
    ]
}

/// Sets what is left, in the process.
pub(in crate::file) fn set_late(cx: &mut RestoreFiles<'_>, socket: Arg, base: &Base) {
    for (option, value) in sizes(base) {
        set_int(cx, socket, (SOL, option), value);
    }
    for (level, option, value) in base.options.iter().filter(|(l, o, _)| is_late(*l, *o)) {
        set(cx, socket, *level, *option, value);
    }
    set_int(cx, socket, (SOL, libc::SO_REUSEADDR), base.reuse);
}
