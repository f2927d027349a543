//! What a descriptor can refer to.

pub mod device;
pub mod regular;
