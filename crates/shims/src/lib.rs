//! What stands between freezeframe and those who know other tools.
//!
//! [`criu`] is CRIU's RPC (`criu swrk FD`, `criu service`). [`runtime`] are adapters for container runtimes.

pub mod criu;
pub mod runtime;
