//! Room for the tile registers of AMX.
//!
//! The kernel gives a thread room for them when it first uses them, and takes
//! no state of them by ptrace before. So a thread that is to have such state
//! clears one and releases them all. (To configure them is not enough, measured on Linux 6.18.) That its process may use them (`ARCH_REQ_XCOMP_PERM`) must be set before.

use freezeframe_error::{Error, Result};
use freezeframe_stub::shell as stub;
use freezeframe_sys::ptrace::{self, SyscallInfo};

use super::{CODE_LEN, Shells, TaskId};

/// The bit of the tile registers in the XSAVE header.
const XTILEDATA: u64 = 1 << 18;
/// Where the header's bits lie in an XSAVE area.
const XSTATE_BV: usize = 512;

/// ldtilecfg [rax]; tilezero tmm0; tilerelease; syscall
const CODE: [u8; 17] = [
    0xc4, 0xe2, 0x78, 0x49, 0x00, 0xc4, 0xe2, 0x7b, 0x49, 0xc0, 0xc4, 0xe2, 0x78, 0x49, 0xc0, 0x0f,
    0x05,
];
/// Where in the region's page of code it lies, behind the stub, and the configuration it loads.
const CODE_AT: usize = CODE_LEN as usize - 128;
const CONFIG_AT: usize = CODE_LEN as usize - 64;

/// Whether an XSAVE area has state of the tile registers.
pub(super) fn in_use(xstate: &[u8]) -> bool {
    let bits = xstate
        .get(XSTATE_BV..XSTATE_BV + 8)
        .and_then(|b| b.try_into().ok());
    bits.is_some_and(|bits| u64::from_le_bytes(bits) & XTILEDATA != 0)
}

impl Shells<'_> {
    /// Lets a stopped task use the tile registers once; its registers are lost.
    pub(super) fn touch_tiles(&self, task: TaskId) -> Result<()> {
        if stub::code().len() > CODE_AT {
            return Err(Error::bug("the stub leaves no room in its page"));
        }
        // Palette 1; tile 0 has 16 rows of 64 bytes.
        let mut config = [0u8; 64];
        (config[0], config[16], config[48]) = (1, 64, 16);
        self.map.write_at(CONFIG_AT, &config)?;
        self.map.write_at(CODE_AT, &CODE)?;
        let tid = self.tid(task);
        let mut regs = ptrace::getregs(tid)?;
        regs.rip = self.base + CODE_AT as u64;
        regs.rax = self.base + CONFIG_AT as u64;
        regs.orig_rax = u64::MAX;
        ptrace::setregs(tid, &regs)?;
        self.tracer.to_syscall_stop(tid, self.end())?;
        if !matches!(ptrace::get_syscall_info(tid)?, SyscallInfo::Entry { .. }) {
            return Err(Error::bug("not at the entry of a call").on_task(tid.0));
        }
        // The call is not to be made.
        let mut regs = ptrace::getregs(tid)?;
        regs.orig_rax = u64::MAX;
        ptrace::setregs(tid, &regs)?;
        self.tracer.to_syscall_stop(tid, self.end())
    }
}
