//! Unix sockets.
//!
//! Dump looks at them from outside: sock_diag(7), getsockname(2), peeks. On restore
//! all of an image are made at once, since they are connected across processes:
//!
//! - A pair without names is made by socketpair(2). A connection whose other end has
//!   a name is made as it was: by a listening socket of that name (the one of the
//!   image, or one for the moment), connect(2) and accept(2). SO_PEERCRED tells of who called
//!   these, so each is called by that process, with the user and groups it had.
//! - The file of a socket is bound under the very name it had (relative, or long
//!   since renamed) inside a directory of ours, in which the process is
//!   rooted for the moment, and then moved to where it is now; a file of the same
//!   socket that still lies there is replaced. A restore that fails takes it away
//!   again. (It is there before watches are: inotify(7) does not report it.)
//! - What has been sent to a connection that waits to be accepted can be read only by
//!   accepting it: that is done once the tree is dead ([`crate::cx::Orphan`]).
//! - When all files of the tree are there, queues are filled, message by message,
//!   each from the socket it came from; then options, shutdowns and the rest.
//!
//! # References
//! unix(7), socketpair(2), sock_diag(7), cmsg(3)

mod dump;
mod family;
mod make;
mod name;
mod record;
mod scratch;
mod settle;
mod waiting;

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd::getsockopt_i32;

use self::record::{Peer, Record};
use crate::about::About;
use crate::cx::{DumpCx, FileItem, FileKind, FileView, Linked, RestoreFiles, Settle, World};
use crate::file::is_opath;

/// See the module.
#[derive(Debug)]
pub struct Unix;

static ABOUT: About = About {
    tag: Tag::new(*b"FUNX"),
    version: 3,
    name: "unix",
    title: "Unix sockets",
    manual: "unix(7), socketpair(2)",
    since: "",
    carried: "stream, datagram and seqpacket sockets: pairs, bound ones (files, also renamed or deleted ones, abstract and autobound names), listening ones with the connections that wait to be accepted (with what is queued in them, by a dump that ends the tree: it is taken when that is dead), connected ones with names and SO_PEERCRED of both sides (user and groups alone of a process that is not of the tree: the PID is a holder's then), closed and half-closed ones; what is queued in them (messages as messages, their senders' addresses, and credentials where asked for: of a process that is not there any more, user and group, with a PID of the receiver's), descriptors in flight, sockets with further descriptors in flight among them; options; with `--ext-unix-sk`, datagram sockets connected to a name outside the tree, and listening ones without the connections from outside that wait to be accepted; one that is `--external unix[INO]` is given again by `--inherit-fd fd[N]:unix[INO]`",
    refused: "a socket file of which the directory has been replaced by a symbolic link, a connection to a process outside the tree (\"a unix socket whose peer is outside the tree is not supported\"), data in a connection that is not accepted yet with `--leave-running` or `--live` (\"a connection that waits to be accepted and has data in it is not supported for a tree that runs on\", and the same of one whose other end is closed), descriptors in flight in such a connection, an out-of-band byte (\"an out-of-band byte (MSG_OOB) in a unix socket is not supported\"), eBPF filters (\"a BPF program on a unix socket is not supported\"), an epoll instance, or an inotify or fanotify group, in flight (\"an epoll instance in flight is not supported\"), a file with locks in flight, and sockets of other families (\"vsock sockets are not supported\", SCTP, AF_ALG, AF_XDP, Bluetooth, CAN, ...)",
    programs: &[
        "sockets::stream",
        "sockets::dgram",
        "sockets::seqpacket",
        "sockets::shut_down",
        "sockets::peer_closed",
        "sockets::options",
        "sockets::across",
        "sockets::flags",
        "sockets::peer_credentials",
        "sockets::rights_in_flight",
        "sockets::peek_offset",
        "sockets::large_queue",
        "sockets::many_pairs",
        "unix::listening",
        "unix::abstract_name",
        "unix::bound",
        "unix::connected",
        "unix::connected_packets",
        "unix::listener_gone",
        "unix::waiting",
        "unix::waiting_with_data",
        "unix::waiting_closed",
        "unix::waiting_with_files",
        "unix::waiting_packets",
        "unix::other_network",
        "unix::peers",
        "unix::workers",
        "unix::half_closed",
        "unix::reset",
        "unix::datagrams",
        "unix::datagrams_connected",
        "unix::datagrams_of_the_gone",
        "unix::renamed",
        "unix::deleted",
        "unix::relative",
        "unix::files_in_flight",
        "unix::sockets_in_flight",
        "unix::datagram_files",
        "unix::credentials",
        "unix::credentials_of_strangers",
        "unix::options",
        "unix::many",
        "unix::urgent",
        "unix::bpf_filter",
        "unix::epoll_in_flight",
        "unix::epoll_of_a_file_in_flight",
        "unix::inotify_in_flight",
        "unix::fanotify_in_flight",
        "beyond::vsock",
    ],
    show: record::show,
};

/// SO_PEERGROUPS (Linux 4.13), SO_PASSPIDFD (6.5), SO_PASSRIGHTS (6.16) and SO_INQ (6.17).
const SO_PEERGROUPS: i32 = 59;
const SO_PASSPIDFD: i32 = 76;
const SO_PASSRIGHTS: i32 = 83;
const SO_INQ: i32 = 84;

/// Options that are an int, with the value of a new socket.
const OPTIONS: [(i32, i32); 20] = [
    (libc::SO_PASSCRED, 0),
    (libc::SO_PASSSEC, 0),
    (SO_PASSPIDFD, 0),
    (SO_PASSRIGHTS, 1),
    (SO_INQ, 0),
    (libc::SO_TIMESTAMP, 0),
    (libc::SO_TIMESTAMPNS, 0),
    (libc::SO_PRIORITY, 0),
    (libc::SO_RCVLOWAT, 1),
    (libc::SO_KEEPALIVE, 0),
    (libc::SO_REUSEADDR, 0),
    (libc::SO_BROADCAST, 0),
    (libc::SO_DONTROUTE, 0),
    (libc::SO_OOBINLINE, 0),
    (libc::SO_NO_CHECK, 0),
    (libc::SO_MARK, 0),
    (libc::SO_RXQ_OVFL, 0),
    (libc::SO_PEEK_OFF, -1),
    (libc::SO_BUSY_POLL, 0),
    // Behind the filter, which it locks.
    (libc::SO_LOCK_FILTER, 0),
];
/// Options that are a structure of this size, all zero for a new socket.
const STRUCTURES: [(i32, usize); 3] = [
    (libc::SO_RCVTIMEO, 16),
    (libc::SO_SNDTIMEO, 16),
    (libc::SO_LINGER, 8),
];

const SOL: i32 = libc::SOL_SOCKET;

/// Its names for the caller.
fn external_names(ino: u64) -> [String; 2] {
    [format!("unix[{ino}]"), format!("socket:[{ino}]")]
}

impl FileKind for Unix {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        file.stat.mode & libc::S_IFMT == libc::S_IFSOCK && !is_opath(file)
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        let [name, _] = external_names(file.stat.ino);
        Some(name)
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let ino = file.stat.ino;
        if external_names(ino).iter().any(|n| cx.is_external(n)) {
            let mut record = Record::new(ino, 0);
            record.peer = Peer::External;
            return ABOUT.record(file.subject(), &record);
        }
        if !dump::is_unix(file)? {
            let ours = file.ours()?;
            let get = |option| getsockopt_i32(ours, SOL, option).map_err(|e| file.blame(e));
            let name = family::name(
                get(libc::SO_DOMAIN)?,
                get(libc::SO_TYPE)?,
                get(libc::SO_PROTOCOL)?,
            );
            return Err(file.refuse(format!("{name} sockets are not supported")));
        }
        let record = dump::record(cx, file)?;
        let raw = ABOUT.record(file.subject(), &record)?;
        let waiting = record.listening.iter().flat_map(|l| &l.waiting);
        if cx.options.kills && waiting.clone().any(|w| w.full || w.client.is_none()) {
            let socket = file.ours()?.try_clone_to_owned();
            cx.orphans.push(Box::new(waiting::Listener {
                socket: socket.map_err(|e| Error::io("dup", e))?,
                record: raw.clone(),
            }));
        }
        Ok(raw)
    }
    fn restore(&self, _cx: &mut RestoreFiles<'_>, _group: &[FileItem<'_>]) -> Result<()> {
        Err(Error::bug("unix sockets are made all at once"))
    }
}

impl Linked for Unix {
    fn peek(&self, file: &FileView<'_>) -> Result<Vec<freezeframe_sys::fd::Message>> {
        match dump::is_unix(file)? {
            true => dump::peek(file),
            false => Ok(Vec::new()),
        }
    }
    fn make<'a>(
        &self,
        world: &mut dyn World,
        items: Vec<FileItem<'a>>,
    ) -> Result<Box<dyn Settle + 'a>> {
        make::make(world, items)
    }
}
