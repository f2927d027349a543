//! What stands between freezeframe and those who know other tools.
//!
//! [`criu`] is CRIU's RPC (`criu swrk FD`, `criu service`). [`runtime`] are adapters for container runtimes.
//! [`agent`] is for a program that checkpoints containers itself.

pub mod agent;
pub mod criu;
pub mod runtime;
