//! CRIU's RPC: protocol buffers in the packets of a SOCK_SEQPACKET socket.
//!
//! A client sends a [`proto::Req`], may be told of the steps of the work, each
//! of which it confirms ([`Client::notify`]), and gets a [`proto::Resp`]. How it all
//! looks is told by `criu(8)` and <https://criu.org/RPC>; names and numbers are
//! those of version 4.2.
//!
//! A request becomes the words of a command line ([`Words`]), so that there is one
//! place where an option is carried, refused by name, or ignored aloud.

mod client;
pub mod proto;
pub mod side;
mod unknown;
mod words;

pub use client::{Client, LARGEST, Mode, Received, errno};
pub use unknown::{Unknown, of_request as unknown_fields};
pub use words::Words;

/// The version of CRIU that we are to its clients. (Without `gitid`: clients take one
/// who has it for the next version.)
pub fn version() -> proto::Version {
    proto::Version {
        major_number: 4,
        minor_number: 2,
        name: Some("freezeframe".to_owned()),
        ..proto::Version::default()
    }
}
