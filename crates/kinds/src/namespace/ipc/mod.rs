//! The IPC namespace of a tree: what is in it belongs to the tree, attached or open or not.
//!
//! Ours is left alone: what is in it has a life of its own. One of the tree's goes with its
//! last process, so all of it is carried: the objects of System V, the POSIX message queues
//! and the settings. We look at it from a thread that has entered it
//! ([`freezeframe_sys::ipc`]), which changes nothing but when a segment was attached last.
//!
//! At a restore the root of the tree unshares its namespace before it has any child, and makes
//! the objects, each under the id it had and as the user who had made it. Shared memory is
//! made as that of our namespace is ([`crate::mem::sysv_shm`]). Limits are widened meanwhile,
//! since an object may be older than they are; the settings come last.
//!
//! What waits in a POSIX queue can be read only by taking it away. So it is taken
//! when the tree is dead, and a tree that is left running may have none.
//!
//! # References
//! ipc_namespaces(7), sysvipc(7), mq_overview(7), proc_sys_kernel(5)

mod make;
mod settings;

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd::fstat;
use freezeframe_sys::ipc::{self, IpcNamespace, Sort};
use freezeframe_sys::proc::ProcDir;
use freezeframe_sys::sysv;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

pub(crate) use make::made_by;
pub(crate) use settings::Settings;

use crate::about::{About, show};
use crate::cx::{DumpCx, MakeObject, NsKind, Orphan, ProcView};
use crate::file::mqueue::{Queue, notified, open as open_queue};
use crate::file::shown;
use crate::mem::sysv_shm;

/// See the module.
#[derive(Debug)]
pub struct Ipc;

static ABOUT: About = About {
    tag: Tag::new(*b"NIPC"),
    version: 2,
    name: "ipc-namespace",
    title: "IPC namespace of the tree",
    manual: "ipc_namespaces(7)",
    since: "",
    carried: "all that is in it, under the ids and keys it has, with owners, creators and permissions: System V shared memory, attached or not, semaphores with their values, message queues with their messages and limits; POSIX message queues with their messages; the settings (`kernel.msgmax`, `kernel.sem`, `fs.mqueue.msg_max`, ...). Not: when and by which PID an object was used last (semaphores say the root's), which ids come next",
    refused: "several of them in a tree (\"its IPC namespace (ipc:[4026532500]) is not that of the root of the tree\"), one that processes outside the tree are in too (\"is in the IPC namespace of the tree too\"), `kernel.shm_rmid_forced`, messages larger than `kernel.msgmax` now is; with the tree left running, messages in POSIX queues (\"holds messages, which are read by taking them away\")",
    programs: &[
        "ipcns::semaphores",
        "ipcns::message_queues",
        "ipcns::segments",
        "ipcns::settings",
        "ipcns::waiters",
        "ipcns::queues",
        "ipcns::queue_with_messages",
        "ipcns::two_namespaces",
        "ipcns::thread_elsewhere",
        "ipcns::forced_removal",
        "ipcns::large_message",
        "ipcns::queue_notifies",
    ],
    show: show::<Record>,
};

/// One of its objects, or the settings, of which there is one record.
#[derive(Debug, Serialize, Deserialize)]
enum Record {
    Settings(Settings),
    Semaphores {
        id: i32,
        owner: Owner,
        values: Vec<u16>,
    },
    Messages {
        id: i32,
        owner: Owner,
        limit: u64,
        /// Type and text.
        messages: Vec<(i64, Vec<u8>)>,
    },
    /// A POSIX message queue, its name without a slash.
    Queue {
        name: Vec<u8>,
        queue: Queue,
    },
}

/// Key, owner and permissions of an object of System V.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Owner {
    key: i32,
    uid: u32,
    gid: u32,
    cuid: u32,
    cgid: u32,
    mode: u32,
}

impl From<ipc::Permissions> for Owner {
    fn from(p: ipc::Permissions) -> Owner {
        Owner {
            key: p.key,
            uid: p.uid,
            gid: p.gid,
            cuid: p.cuid,
            cgid: p.cgid,
            mode: p.mode,
        }
    }
}

impl NsKind for Ipc {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn file(&self) -> &'static str {
        "ns/ipc"
    }
    fn flag(&self) -> i32 {
        libc::CLONE_NEWIPC
    }
    fn enter(&self, cx: &mut DumpCx<'_>, root: &ProcView) -> Result<()> {
        cx.ipc = IpcNamespace::of(&root.dir)?;
        Ok(())
    }
    fn dump(&self, cx: &mut DumpCx<'_>, blockers: &mut Vec<Error>) -> Result<()> {
        let namespace = cx.ipc.clone();
        let settings = namespace.inside(Settings::read)?;
        if settings.removes_unattached() {
            let what = "an IPC namespace with kernel.shm_rmid_forced is not supported";
            blockers.push(Error::unsupported(what));
        }
        let mut records = vec![Record::Settings(settings)];
        records.extend(namespace.inside(objects)?);
        let mut refuse = |e: Error| match e.kind() {
            Kind::Unsupported => {
                blockers.push(e);
                Ok(())
            }
            _ => Err(e),
        };
        for (id, segment) in namespace.inside(|| segments(&cx.segments))? {
            sysv_shm::dump_unattached(cx, id, &segment).or_else(&mut refuse)?;
        }
        for (n, record) in records.iter().enumerate() {
            cx.records.push(ABOUT.record(n as u64, record)?);
        }
        let first = records.len() as u64;
        for (n, name) in namespace.inside(ipc::queue_names)?.into_iter().enumerate() {
            let subject = first + n as u64;
            dump_queue(cx, &name, subject)
                .on(format!("POSIX message queue {}", shown(&name)))
                .or_else(&mut refuse)?;
        }
        Ok(())
    }
    fn restore(&self, cx: &mut dyn MakeObject, records: &[&RawRecord]) -> Result<()> {
        let namespace = IpcNamespace::of(&ProcDir::open(cx.pid())?)?;
        let mut settings = None;
        let mut objects = Vec::new();
        for record in records {
            match ABOUT.decode(record)? {
                Record::Settings(all) => settings = Some(all),
                object => objects.push(object),
            }
        }
        let settings =
            settings.ok_or_else(|| Error::corrupt("an IPC namespace has no settings"))?;
        namespace.inside(|| settings.widen())?;
        cx.segments().enter(namespace, settings);
        objects
            .iter()
            .try_for_each(|object| make::object(cx, object))
    }
}

/// All semaphores and message queues of System V.
fn objects() -> Result<Vec<Record>> {
    let mut all = Vec::new();
    for id in ipc::ids(Sort::Semaphores)? {
        let set = ipc::semaphores(id)?;
        all.push(Record::Semaphores {
            id,
            owner: set.permissions.into(),
            values: set.values,
        });
    }
    for id in ipc::ids(Sort::Messages)? {
        let queue = ipc::messages(id).map_err(|e| match e.errno() {
            Some(libc::EINVAL) => {
                Error::unsupported("a message larger than kernel.msgmax is not supported")
                    .on(format!("System V message queue {id}"))
            }
            _ => e,
        })?;
        all.push(Record::Messages {
            id,
            owner: queue.permissions.into(),
            limit: queue.limit,
            messages: queue.messages,
        });
    }
    Ok(all)
}

/// The segments that no process of the tree has attached.
fn segments(attached: &sysv_shm::Attached) -> Result<Vec<(i32, sysv::Segment)>> {
    let ids = ipc::ids(Sort::Segments)?.into_iter();
    let others = ids.filter(|id| !attached.has(*id));
    others.map(|id| Ok((id, sysv::shm_stat(id)?))).collect()
}

fn dump_queue(cx: &mut DumpCx<'_>, name: &[u8], subject: u64) -> Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
    let queue = cx.ipc.inside(|| open_queue(name, flags))?;
    let stat = fstat(&queue)?;
    let mut text = String::new();
    let mut file = File::from(queue);
    file.read_to_string(&mut text)
        .map_err(|e| Error::io("read", e))?;
    if notified(&text) != 0 {
        let what = "the notification of a message queue (mq_notify) is not supported";
        return Err(Error::unsupported(what));
    }
    let (queue, waiting) = Queue::look(cx, &file, &stat)?;
    let record = Record::Queue {
        name: name.to_vec(),
        queue,
    };
    let record = ABOUT.record(subject, &record)?;
    cx.records.push(record.clone());
    if waiting {
        let queue = OwnedFd::from(file);
        cx.orphans.push(Box::new(Left { queue, record }));
    }
    Ok(())
}

/// A queue of a tree that is to be killed.
#[derive(Debug)]
struct Left {
    queue: OwnedFd,
    record: RawRecord,
}

impl Orphan for Left {
    fn take(self: Box<Self>, _image: &str, _: &mut Vec<String>) -> Result<Option<RawRecord>> {
        let Record::Queue { name, mut queue } = ABOUT.decode(&self.record)? else {
            return Err(Error::bug("a message queue that is none"));
        };
        queue.take(&self.queue, &name)?;
        ABOUT
            .record(self.record.subject, &Record::Queue { name, queue })
            .map(Some)
    }
}
