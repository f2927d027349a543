//! The kinds there are: one line each.

use freezeframe_image::{RawRecord, Tag};

use crate::about::{About, Family};
use crate::cx::{
    AsksOn, BeforeTree, FileKind, Linked, LookedAtLast, MemKind, NsKind, PlaceKind, Settles,
    Talking, TaskKind,
};
use crate::{cgroups, file, mem, namespace, task};

/// What a descriptor can refer to. The first that claims a file has it.
pub static FILES: &[&dyn FileKind] = &[
    &file::eventfd::Eventfd,
    &file::epoll::Epoll,
    &file::signalfd::Signalfd,
    &file::timerfd::Timerfd,
    &file::inotify::Inotify,
    &file::fanotify::Fanotify,
    &file::pidfd::Pidfd,
    &file::pipe::Pipe,
    &file::fifo::Fifo,
    &file::inet::tcp::Tcp,
    &file::inet::udp::Udp,
    &file::inet::raw::Raw,
    &file::packet::Packet,
    &file::netlink::Netlink,
    &file::unix::Unix,
    &file::memfd::Memfd,
    &file::device::Device,
    &file::mqueue::Mqueue,
    &file::terminal::Terminal,
    &file::unlinked::Unlinked,
    &file::regular::Regular,
    &file::other::Other,
];

/// Those of them of which some are made before the tree is.
pub static BEFORE_TREE: &[&dyn BeforeTree] = &[&file::terminal::Terminal];

/// Of those, the ones that are made all at once.
pub static LINKED: &[&dyn Linked] = &[&file::unix::Unix];

/// Of the first, those that others talk to who are not stopped.
pub static TALKING: &[&dyn Talking] = &[&file::inet::tcp::Tcp];

/// And those that are touched only when nothing can refuse the dump any more.
pub static LOOKED_AT_LAST: &[&dyn LookedAtLast] = &[&file::terminal::Terminal];

/// What a VMA can map. The first that claims a VMA has it.
pub static MEMORY: &[&dyn MemKind] = &[
    &mem::vdso::Vdso,
    &mem::anonymous::Anonymous,
    &mem::shared_anonymous::SharedAnonymous,
    &mem::sysv_shm::SysvShm,
    &mem::dev_zero::DevZero,
    &mem::memfd::Memfd,
    &mem::aio_ring::AioRing,
    &mem::other::Other,
    &mem::ghost::Ghost,
    &mem::file::MappedFile,
];

/// Attributes of threads and processes. Within a stage they are restored in this order.
pub static TASKS: &[&dyn TaskKind] = &[
    // Stage::Fs. The first three use paths of the old root.
    &task::controlling_terminal::ControllingTerminal,
    &task::mm_layout::MmLayout,
    &task::login_uid::LoginUid,
    &task::fs::Fs,
    // Stage::Attributes. The timer slack behind the policy, which resets it.
    &task::comm::Comm,
    &task::personality::Personality,
    &task::cpu_flags::CpuFlags,
    &task::oom_score_adj::OomScoreAdj,
    &task::affinity::Affinity,
    &task::scheduler::Scheduler,
    &task::timer_slack::TimerSlack,
    &task::io_priority::IoPriority,
    &task::aio::Aio,
    // Stage::Signals
    &task::sigaction::SigActions,
    &task::altstack::AltStack,
    // Stage::Pending
    &task::pending::Pending,
    // Stage::Timers
    &task::itimers::ITimers,
    &task::posix_timers::PosixTimers,
    // Stage::Thread. Limits behind the signals and timers that count against them.
    &task::registers::Registers,
    &task::restart::Restart,
    &task::sigmask::SigMask,
    &task::lock_future::LockFuture,
    &task::file_locks::FileLocks,
    &task::rlimits::Rlimits,
    &task::semaphore_undo::SemaphoreUndo,
    &task::membarrier::Membarrier,
    &task::robust_list::RobustList,
    &task::tid_address::TidAddress,
    &task::syscall_user_dispatch::SyscallUserDispatch,
    &task::rseq::Rseq,
    // Stage::Seccomp
    &task::seccomp::Seccomp,
    // Stage::Credentials
    &task::credentials::Credentials,
    // Stage::AfterCredentials
    &task::dumpable::Dumpable,
    &task::parent_death::ParentDeath,
    &task::subreaper::Subreaper,
    &task::mm_flags::MmFlags,
];

/// Of these, the ones that ask more than once.
pub static ASKING_ON: &[&dyn AsksOn] = &[&task::semaphore_undo::SemaphoreUndo];

/// And those that go on while the tree is stopped.
pub static SETTLING: &[&dyn Settles] = &[&task::aio::Aio];

/// Namespaces that a tree may have to itself.
pub static NAMESPACES: &[&dyn NsKind] = &[&namespace::ipc::Ipc];

/// What tasks are in that is not of the tree.
pub static PLACES: &[&dyn PlaceKind] = &[&cgroups::Cgroups];

/// The file kind with this tag.
pub fn file(tag: Tag) -> Option<&'static dyn FileKind> {
    FILES.iter().copied().find(|k| k.about().tag == tag)
}

/// The memory kind with this tag.
pub fn memory(tag: Tag) -> Option<&'static dyn MemKind> {
    MEMORY.iter().copied().find(|k| k.about().tag == tag)
}

/// The task kind with this tag.
pub fn task(tag: Tag) -> Option<&'static dyn TaskKind> {
    TASKS.iter().copied().find(|k| k.about().tag == tag)
}

/// All kinds, by family.
pub fn all() -> impl Iterator<Item = (Family, &'static About)> {
    let files = FILES.iter().map(|k| (Family::File, k.about()));
    let memory = MEMORY.iter().map(|k| (Family::Memory, k.about()));
    let tasks = TASKS.iter().map(|k| (Family::Task, k.about()));
    let spaces = NAMESPACES.iter().map(|k| (Family::Namespace, k.about()));
    let places = PLACES.iter().map(|k| (Family::Task, k.about()));
    files.chain(memory).chain(tasks).chain(places).chain(spaces)
}

/// What a record's kind says of itself.
pub fn about(tag: Tag) -> Option<&'static About> {
    all().map(|(_, about)| about).find(|about| about.tag == tag)
}

/// For the fuzzers: decodes `body` as a record of kind `tag`, so many versions old,
/// whatever comes of it.
pub fn fuzz_decode(tag: Tag, older: u16, body: &[u8]) {
    if let Some(about) = about(tag) {
        let raw = RawRecord {
            tag,
            version: about.version.saturating_sub(older),
            flags: 0,
            subject: 0,
            body: body.to_vec(),
        };
        let _ = (about.show)(&raw);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn tags_and_names_are_unique() {
        let mut tags = HashSet::new();
        let mut names = HashSet::new();
        for (_, about) in all() {
            assert!(tags.insert(about.tag), "tag of {} is taken", about.name);
            assert!(names.insert(about.name), "name {} is taken", about.name);
        }
    }

    #[test]
    fn every_kind_says_what_it_is() {
        for (_, about) in all() {
            assert!(!about.title.is_empty(), "{}: no title", about.name);
            assert!(!about.manual.is_empty(), "{}: no manual page", about.name);
            assert!(
                !about.carried.is_empty(),
                "{}: does not say what is carried",
                about.name
            );
            assert!(
                !about.programs.is_empty(),
                "{}: no self-checking program",
                about.name
            );
        }
    }
}
