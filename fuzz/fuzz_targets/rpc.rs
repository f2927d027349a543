//! Requests of CRIU's RPC: whatever a client sends, it becomes the words of a command line, or is refused.
#![no_main]

use std::sync::OnceLock;

use freezeframe_shims::criu::proto::Req;
use freezeframe_shims::criu::{Client, Mode, Words, unknown_fields};
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use prost::Message;

/// One of each way to come to us; they say nothing.
static CLIENTS: OnceLock<[Client; 2]> = OnceLock::new();

fn clients() -> [Client; 2] {
    let flags = SockFlag::SOCK_CLOEXEC;
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (a, b) = pair.expect("two descriptors");
    [(a, Mode::Swrk), (b, Mode::Service)]
        .map(|(socket, mode)| Client::new(socket, mode).expect("a socket of packets"))
}

fuzz_target!(|data: &[u8]| {
    let Ok(req) = Req::decode(data) else { return };
    let unknown = unknown_fields(data);
    for client in CLIENTS.get_or_init(clients) {
        if let Ok(words) = Words::of(&req, &unknown, client) {
            // Each is one option, and none can be taken for another or for an action.
            assert!(
                words
                    .options
                    .iter()
                    .all(|w| w.as_encoded_bytes().starts_with(b"--"))
            );
        }
    }
    if unknown.is_empty() {
        assert!(unknown_fields(&req.encode_to_vec()).is_empty());
    }
    assert_eq!(Req::decode(&*req.encode_to_vec()).ok(), Some(req));
});
