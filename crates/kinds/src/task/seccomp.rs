//! Seccomp mode and filters of a thread.
//!
//! Read from outside (`PTRACE_SECCOMP_GET_FILTER`, `PTRACE_SECCOMP_GET_METADATA`; takes CAP_SYS_ADMIN), installed
//! in the thread by seccomp(2) in their first order, while the tracer suspends
//! seccomp (`PTRACE_O_SUSPEND_SECCOMP`), which it does until it lets the thread go. Threads that
//! share filters (`SECCOMP_FILTER_FLAG_TSYNC`) get equal ones each.

use freezeframe_error::{Error, Result, ResultExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Replies};
use freezeframe_sys::proc::SeccompMode;
use freezeframe_sys::ptrace::{self, SockFilter};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Seccomp;

static ABOUT: About = About {
    tag: Tag::new(*b"SECC"),
    version: 1,
    name: "seccomp",
    title: "Seccomp",
    manual: "seccomp(2)",
    since: "",
    carried: "strict mode; filters in their order with SECCOMP_FILTER_FLAG_LOG",
    refused: "a filter that asks a listener (SECCOMP_RET_USER_NOTIF); SECCOMP_FILTER_FLAG_SPEC_ALLOW is not seen",
    programs: &[
        "credentials::seccomp_filter",
        "credentials::seccomp_chain",
        "credentials::seccomp_threads",
        "credentials::seccomp_strict",
        "credentials::seccomp_tight",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
enum Record {
    /// read, write, exit and sigreturn.
    Strict,
    /// In the order of their installation.
    Filters(Vec<Filter>),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Filter {
    /// `SECCOMP_FILTER_FLAG_*`
    flags: u64,
    /// `struct sock_filter` after `struct sock_filter`.
    program: Vec<u8>,
}

/// Size of `struct sock_filter`.
const INSTRUCTION: usize = 8;
/// `BPF_MAXINSNS`
const MAX_INSTRUCTIONS: usize = 4096;
/// The kernel allows 32768 instructions in all filters of a thread together, each counted with 4 more.
const MAX_FILTERS: usize = 32768;
/// `BPF_RET | BPF_K`
const RETURN_CONSTANT: u16 = 0x06;
/// `SECCOMP_RET_ACTION_FULL`, `SECCOMP_RET_USER_NOTIF`
const ACTION: u32 = 0xffff_0000;
const USER_NOTIF: u32 = 0x7fc0_0000;

/// The filters of a frozen thread.
fn filters(task: &TaskView<'_>) -> Result<Vec<Filter>> {
    let mut filters = Vec::new();
    while let Some(program) =
        ptrace::seccomp_get_filter(task.tid, filters.len() as u64).on_task(task.tid.0)?
    {
        if asks_listener(&program) {
            return Err(Error::unsupported(
                "a seccomp filter with a listener (SECCOMP_RET_USER_NOTIF) is not supported",
            )
            .on_task(task.tid.0));
        }
        let flags =
            ptrace::seccomp_get_metadata(task.tid, filters.len() as u64).on_task(task.tid.0)?;
        let program = program.iter().flat_map(bytes).collect();
        filters.push(Filter { flags, program });
    }
    Ok(filters)
}

fn asks_listener(program: &[SockFilter]) -> bool {
    program
        .iter()
        .any(|i| i.code == RETURN_CONSTANT && i.k & ACTION == USER_NOTIF)
}

/// A `struct sock_filter`.
fn bytes(instruction: &SockFilter) -> [u8; INSTRUCTION] {
    let [a, b] = instruction.code.to_le_bytes();
    let [c, d, e, f] = instruction.k.to_le_bytes();
    [a, b, instruction.jt, instruction.jf, c, d, e, f]
}

impl TaskKind for Seccomp {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Seccomp
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let record = match task.status.seccomp {
            // A fresh thread has the restorer's. Which must have none, else it could not suspend seccomp.
            SeccompMode::Disabled => return Ok(None),
            SeccompMode::Strict => Record::Strict,
            SeccompMode::Filter => Record::Filters(filters(task)?),
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        let filters = match record {
            Record::Strict => {
                task.batch.call(
                    "prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT)",
                    libc::SYS_prctl,
                    [
                        libc::PR_SET_SECCOMP.into(),
                        libc::SECCOMP_MODE_STRICT.into(),
                        Arg::Imm(0),
                    ],
                );
                return Ok(());
            }
            Record::Filters(filters) => filters,
        };
        if filters.len() > MAX_FILTERS {
            return Err(Error::corrupt("there are too many seccomp filters").on_task(task.tid.0));
        }
        for (i, filter) in filters.iter().enumerate() {
            let len = filter.program.len() / INSTRUCTION;
            if filter.program.len() % INSTRUCTION != 0 || len == 0 || len > MAX_INSTRUCTIONS {
                return Err(
                    Error::corrupt("a seccomp filter has a wrong length").on_task(task.tid.0)
                );
            }
            let program = task.batch.data(&filter.program);
            // struct sock_fprog: a length in instructions, padding, a pointer.
            let mut fprog = [0; 16];
            fprog[..2].copy_from_slice(&(len as u16).to_le_bytes());
            let fprog = task.batch.data(&fprog);
            task.batch.pointer(fprog.at(8), program);
            task.batch.call(
                format!("seccomp(SECCOMP_SET_MODE_FILTER), filter {i}"),
                libc::SYS_seccomp,
                [
                    libc::SECCOMP_SET_MODE_FILTER.into(),
                    filter.flags.into(),
                    fprog.into(),
                ],
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_as_the_kernel_has_it() {
        let i = SockFilter {
            code: 0x0015,
            jt: 1,
            jf: 2,
            k: 0xc000_003e,
        };
        assert_eq!(bytes(&i), [0x15, 0, 1, 2, 0x3e, 0, 0, 0xc0]);
    }

    #[test]
    fn a_listener_is_seen() {
        let allow = SockFilter {
            code: 6,
            jt: 0,
            jf: 0,
            k: 0x7fff_0000,
        };
        let notify = SockFilter {
            k: 0x7fc0_0000,
            ..allow
        };
        assert!(!asks_listener(&[allow]));
        assert!(asks_listener(&[allow, notify]));
    }
}
