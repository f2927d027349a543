//! What a kind is.

use std::os::fd::{BorrowedFd, OwnedFd};

use freezeframe_error::{Error, Result};
use freezeframe_image::RawRecord;
use freezeframe_inject::{Batch, Replies};
use freezeframe_sys::fd::Message;
use freezeframe_sys::ids::Tid;
#[cfg(doc)]
use freezeframe_sys::task_fields::TaskFields;

use super::{
    Asked, Backing, Before, DumpCx, FileItem, FileView, Late, MakeMapping, MakeObject, Mapped,
    PrepareFiles, ProcView, RestoreFiles, RestoreOptions, RestoreTask, Scope, Sharing, Stage,
    TaskView, VmaView,
};
use crate::about::About;
use crate::model::{self, FileId};

/// An attribute of a thread or a process.
pub trait TaskKind: Sync + std::fmt::Debug {
    /// What it is.
    fn about(&self) -> &'static About;
    /// Once per process or per thread.
    fn scope(&self) -> Scope;
    /// When its calls are made on restore.
    fn stage(&self) -> Stage;
    /// Adds to the batch that runs inside the thread what only the thread itself can ask.
    fn ask(&self, _task: &TaskView<'_>, _batch: &mut Batch) -> Result<Asked> {
        Ok(Asked::default())
    }
    /// Whether threads of a process with equal [`TaskFields::flags`] answer alike: then one of
    /// them is asked for all, and `dump` gets its answers.
    fn alike(&self) -> bool {
        false
    }
    /// Its record, or none if there is nothing to restore (the state of a fresh
    /// process that [`crate::cx::Stage`] describes).
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        asked: &Asked,
        replies: &Replies,
    ) -> Result<Option<RawRecord>>;
    /// Appends the calls that set it, or sets it from outside.
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()>;
}

/// A task kind that goes on asking tasks, each time by what they have answered.
pub trait AsksOn: TaskKind {
    /// Called once, before records are made.
    fn ask_on(&self, cx: &mut DumpCx<'_>, tree: &mut dyn Stopped) -> Result<()>;
}

/// A task kind of which something goes on in the kernel while the tree is stopped, until it ends.
pub trait Settles: TaskKind {
    /// Makes ready what need not be while the tree is stopped.
    fn prepare(&self, before: &mut Before);
    /// Waits for the end: before it nothing of the tree stands still. What does not end in time
    /// is a blocker; where there are others, or `over` says so, nothing is waited for.
    fn settle(
        &self,
        cx: &mut DumpCx<'_>,
        blockers: &mut Vec<Error>,
        over: &dyn Fn() -> bool,
    ) -> Result<()>;
}

/// The stopped tree, to be asked.
pub trait Stopped {
    /// Runs calls in one of its threads. Results are for the caller to look at.
    fn run(&mut self, tid: Tid, batch: &Batch) -> Result<Replies>;
}

/// A kind of open file.
pub trait FileKind: Sync + std::fmt::Debug {
    /// What it is.
    fn about(&self) -> &'static About;
    /// Whether this file is one. The first kind of the registry that claims a file has it.
    fn claims(&self, file: &FileView<'_>) -> bool;
    /// Its name in CRIU's spelling, for `--external` and `--inherit-fd`.
    fn external_name(&self, file: &FileView<'_>) -> Option<String>;
    /// Its record.
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord>;
    /// Files that must have their numbers before this one is made.
    fn deps(&self, _item: &FileItem<'_>) -> Result<Vec<FileId>> {
        Ok(Vec::new())
    }
    /// Files with the same key are made together by one call of `restore`
    /// (the two ends of a pipe). The key is of this kind alone.
    fn group(&self, item: &FileItem<'_>) -> Result<u64> {
        Ok(item.id.0.into())
    }
    /// Makes the files of one group in one process.
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()>;
}

/// A kind of open file of which the restorer makes some itself, before any
/// process of the tree is: terminals, which sessions have from their beginning.
pub trait BeforeTree: FileKind {
    /// Makes them. Called once with all files of this kind, where there are any.
    fn prepare(&self, cx: &mut PrepareFiles<'_>, files: &[FileItem<'_>]) -> Result<()>;
}

/// A kind of open file that others talk to who are not stopped: TCP connections.
pub trait Talking: FileKind {
    /// Reads all of the tree together, before any file is dumped. What has to be
    /// taken hold of for that goes to [`DumpCx::held`].
    fn gather(&self, cx: &mut DumpCx<'_>, files: &[FileView<'_>]) -> Result<()>;
    /// Those of an image that are to talk again. From here on, while nothing is there to
    /// answer them, the others are held off.
    fn sleepers(&self, files: &[FileItem<'_>], options: &RestoreOptions)
    -> Result<Box<dyn Waking>>;
}

/// What a dump holds; dropped, all is as before.
pub trait Held: std::fmt::Debug {
    /// Kills the tree, whose image is complete, if that has to be done so that
    /// nobody outside is told. All of it or nothing, even if we are killed.
    ///
    /// Gives descriptors to be closed when the tree is dead.
    fn end(self: Box<Self>, image: &str, tree: &[ProcView]) -> Result<Vec<OwnedFd>>;
}

/// What a file of a tree that is to be killed has in the kernel, and what can be
/// read only by taking it away: connections that wait to be accepted. It is left
/// alone until the tree is dead, its image being complete but for this.
pub trait Orphan: std::fmt::Debug {
    /// Takes it. Gives the file's record anew, with what was found, or none if
    /// nothing was; and warnings. `image` is the image's id.
    fn take(self: Box<Self>, image: &str, warnings: &mut Vec<String>) -> Result<Option<RawRecord>>;
}

/// Files of a restore that are silent until all else of the tree is there.
pub trait Waking: std::fmt::Debug {
    /// Takes descriptors of ours for them, once they have their numbers.
    fn take(&mut self, get: &mut dyn FnMut(FileId) -> Result<OwnedFd>) -> Result<()>;
    /// Makes them live, right before the tree is; `image` is the image's id.
    fn wake(self: Box<Self>, image: &str) -> Result<()>;
}

/// A kind of open file that cannot be looked at whole without touching it: terminals.
pub trait LookedAtLast: FileKind {
    /// Adds to the records what is looked at only when nothing can refuse the dump any more.
    fn look_last(&self, cx: &mut DumpCx<'_>) -> Result<()>;
}

/// A file kind whose files are connected with each other across processes and
/// can hold other files: unix sockets. All of the image are made at once, before
/// any other file ([`FileKind::restore`] is not called), and are finished
/// when every file of the tree is there.
pub trait Linked: FileKind {
    /// What waits in the file. Nothing must change by it.
    fn peek(&self, file: &FileView<'_>) -> Result<Vec<Message>>;
    /// Makes them, and hands each over by [`World::provide`].
    fn make<'a>(
        &self,
        world: &mut dyn World,
        items: Vec<FileItem<'a>>,
    ) -> Result<Box<dyn Settle + 'a>>;
}

/// The rest of the work on files of a [`Linked`] kind.
pub trait Settle {
    /// Fills queues and sets what has to be set last. Every file has its numbers now.
    fn settle(self: Box<Self>, world: &mut dyn World) -> Result<()>;
}

/// The tree that is being rebuilt, as a [`Linked`] kind works with it: all
/// processes are there, with their PIDs.
pub trait World {
    /// Options.
    fn options(&self) -> &RestoreOptions;
    /// The image's tree.
    fn tree(&self) -> &model::Tree;
    /// The image's processes.
    fn processes(&self) -> &[model::Process];
    /// The processes that hold a file; none if it is in flight.
    fn holders(&self, id: FileId) -> &[i32];
    /// Runs calls in a process.
    fn run(&mut self, pid: i32, batch: &Batch) -> Result<Replies>;
    /// Brings one of its descriptors to us.
    fn get_fd(&mut self, pid: i32, fd: i32) -> Result<OwnedFd>;
    /// Gives it one of ours; returns the number there.
    fn send_fd(&mut self, pid: i32, fd: BorrowedFd<'_>) -> Result<i32>;
    /// Hands over a file made. The engine gives it to its holders, and sets
    /// owner and signal; status flags are the kind's.
    fn provide(&mut self, id: FileId, fd: OwnedFd);
    /// A duplicate, of ours, of any file made: of its own kind at once, of
    /// others when settling.
    fn file(&mut self, id: FileId) -> Result<OwnedFd>;
    /// What is to be done at the very end.
    fn late(&mut self) -> &mut Late;
    /// Something the caller should know.
    fn warn(&mut self, text: String);
}

/// A kind of memory object.
pub trait MemKind: Sync + std::fmt::Debug {
    /// What it is.
    fn about(&self) -> &'static About;
    /// Whether this VMA maps one. The first kind of the registry that claims a VMA has it.
    fn claims(&self, vma: &VmaView<'_>) -> bool;
    /// The object, its record made on first sight by [`DumpCx::object`].
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped>;
    /// Made per process or per tree.
    fn sharing(&self) -> Sharing;
    /// Makes a tree-wide object, empty but of its full size; the engine fills it. (Sharing::Tree)
    fn make(&self, cx: &mut dyn MakeObject, record: &RawRecord) -> Result<OwnedFd>;
    /// What a process maps. (Sharing::Process; a tree-wide object gives [`Backing::Object`].)
    fn backing(&self, cx: &mut MakeMapping<'_>, record: &RawRecord) -> Result<Backing>;
}

/// A kind of namespace that a tree may have to itself, all of it the same.
pub trait NsKind: Sync + std::fmt::Debug {
    /// What it is. An image that has a record of this kind is of a tree with such a namespace.
    fn about(&self) -> &'static About;
    /// Its file in /proc/PID.
    fn file(&self) -> &'static str;
    /// `CLONE_NEW*`
    fn flag(&self) -> i32;
    /// The tree has its own, that of its root. Called before anything in it is looked at.
    fn enter(&self, cx: &mut DumpCx<'_>, root: &ProcView) -> Result<()>;
    /// Adds to the records what is in it, when the rest of the tree is known.
    fn dump(&self, cx: &mut DumpCx<'_>, blockers: &mut Vec<Error>) -> Result<()>;
    /// Fills a new one, which the root of the tree has just entered, before there is anything
    /// else of the tree.
    fn restore(&self, cx: &mut dyn MakeObject, records: &[&RawRecord]) -> Result<()>;
}

/// Something outside the tree that its tasks are in: cgroups.
pub trait PlaceKind: Sync + std::fmt::Debug {
    /// What it is.
    fn about(&self) -> &'static About;
    /// Adds to the records where the tasks are, if it is to be carried.
    fn dump(&self, cx: &mut DumpCx<'_>, blockers: &mut Vec<Error>) -> Result<()>;
    /// Makes the places ready, before there is any process; none if nothing is to be done.
    fn prepare(
        &self,
        records: &[&RawRecord],
        options: &RestoreOptions,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Box<dyn Place>>>;
}

/// Where the tasks of a restored tree belong. Dropped, what was made for them is removed.
pub trait Place: std::fmt::Debug {
    /// Puts a new process there.
    fn put(&mut self, pid: i32) -> Result<()>;
    /// Puts a new thread of a process there.
    fn put_thread(&mut self, tid: i32, pid: i32) -> Result<()>;
    /// Does what is to be done when all tasks are there.
    fn finish(&mut self) -> Result<()>;
    /// The tree lives: leaves everything as it is.
    fn keep(self: Box<Self>);
}
