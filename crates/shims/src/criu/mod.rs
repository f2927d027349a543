//! CRIU's RPC: protocol buffers in the packets of a SOCK_SEQPACKET socket.
//!
//! A client sends a [`proto::Req`], may be notified of the steps of the work, each
//! of which it confirms, and gets a [`proto::Resp`]. How it all looks is told by
//! `criu(8)` and <https://criu.org/RPC>; names and numbers are those of version 4.2.

pub mod proto;
