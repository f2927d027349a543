//! What sockets of other families are called, to refuse them by name.

pub(super) fn name(domain: i32, kind: i32, protocol: i32) -> String {
    match (domain, kind, protocol) {
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => "TCP".into(),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_MPTCP) => "MPTCP".into(),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP) => "UDP".into(),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE) => {
            "UDP-Lite".into()
        }
        (
            libc::AF_INET | libc::AF_INET6,
            libc::SOCK_DGRAM,
            libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6,
        ) => "ping".into(),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_RAW, _) => "raw IP".into(),
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_SCTP) => "SCTP".into(),
        (libc::AF_INET | libc::AF_INET6, _, 115) => "L2TP".into(),
        (libc::AF_KEY, ..) => "PF_KEY".into(),
        (libc::AF_PPPOX, ..) => "PPPoX".into(),
        (libc::AF_RDS, ..) => "RDS".into(),
        (libc::AF_TIPC, ..) => "TIPC".into(),
        (43, ..) => "SMC".into(),
        (libc::AF_NETLINK, ..) => "netlink".into(),
        (libc::AF_PACKET, ..) => "packet".into(),
        (libc::AF_VSOCK, ..) => "vsock".into(),
        (libc::AF_ALG, ..) => "AF_ALG".into(),
        (libc::AF_XDP, ..) => "AF_XDP".into(),
        (libc::AF_BLUETOOTH, ..) => "Bluetooth".into(),
        (libc::AF_CAN, ..) => "CAN".into(),
        _ => format!("family {domain}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_called_by_their_name() {
        let tcp = name(libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        let raw = name(libc::AF_INET, libc::SOCK_RAW, 89);
        let netlink = name(libc::AF_NETLINK, libc::SOCK_RAW, 0);
        assert_eq!((&*tcp, &*raw, &*netlink), ("TCP", "raw IP", "netlink"));
        assert_eq!(name(99, 1, 0), "family 99");
    }
}
