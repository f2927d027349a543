//! Where page payload is written to.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use freezeframe_error::{Result, ResultExt, SysExt};
use freezeframe_image::ImageWriter;
use freezeframe_sys::fd::start_writeback;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::PAGE;

/// One page file, appended to by one thread: writers of one file wait for each
/// other in the kernel.
#[derive(Debug)]
pub(crate) struct PageSink {
    file: Arc<File>,
    number: u32,
    path: PathBuf,
    at: u64,
    direct: bool,
    /// Who is told what is to go to the disk, and from where on.
    early: Option<(Sender<Written>, u64)>,
}

/// A part of a file that has been written.
#[derive(Debug)]
struct Written {
    file: Arc<File>,
    offset: u64,
    len: u64,
}

/// A thread that starts to write page files to their disk while more is being
/// stored. Starting it takes as long as the disk is behind, which nobody
/// who keeps a target stopped may wait for.
#[derive(Debug)]
pub(crate) struct WriteBack {
    sender: Option<Sender<Written>>,
    thread: Option<JoinHandle<()>>,
}

/// How much is written at once.
const EARLY: u64 = 16 << 20;

impl WriteBack {
    /// None where there can be no thread: fsync does it all then.
    pub(crate) fn start() -> Option<WriteBack> {
        let (sender, written) = mpsc::channel::<Written>();
        let run = move || {
            for Written { file, offset, len } in written {
                // What it cannot do is left to fsync.
                let _ = start_writeback(&*file, offset, len);
            }
        };
        let thread = thread::Builder::new().name("freezeframe-io".to_owned());
        let thread = thread.spawn(run).ok()?;
        Some(WriteBack {
            sender: Some(sender),
            thread: Some(thread),
        })
    }
}

/// After the sinks are dropped: it ends when nobody can tell it more.
impl Drop for WriteBack {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl PageSink {
    /// A new page file; if so wanted, and where the filesystem can do that,
    /// written past the page cache.
    pub(crate) fn new(writer: &mut ImageWriter, direct: bool) -> Result<PageSink> {
        let pages = writer.new_pages()?;
        let direct = direct && {
            let flags = fcntl(&pages.file, FcntlArg::F_GETFL).sys("fcntl")?;
            let flags = OFlag::from_bits_retain(flags) | OFlag::O_DIRECT;
            fcntl(&pages.file, FcntlArg::F_SETFL(flags)).is_ok()
        };
        Ok(PageSink {
            path: writer.pages_path(pages.number),
            file: Arc::new(pages.file),
            number: pages.number,
            at: 0,
            direct,
            early: None,
        })
    }

    /// Has what is appended from here on written to the disk early, except
    /// where it goes there at once.
    pub(crate) fn write_back(&mut self, by: &WriteBack) {
        if let (None, false, Some(sender)) = (&self.early, self.direct, &by.sender) {
            self.early = Some((sender.clone(), self.at));
        }
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Whether it is written past the page cache: from whole pages of memory,
    /// in whole pages.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }

    /// Appends bytes, on a page boundary if so wanted; gives their offset.
    pub(crate) fn append(&mut self, bytes: &[u8], aligned: bool) -> Result<u64> {
        let at = match aligned {
            true => self.at.next_multiple_of(PAGE),
            false => self.at,
        };
        self.file
            .write_all_at(bytes, at)
            .sys("pwrite")
            .on(self.path.display())?;
        self.at = at + bytes.len() as u64;
        if let Some((sender, from)) = &mut self.early
            && self.at - *from >= EARLY
        {
            let written = Written {
                file: Arc::clone(&self.file),
                offset: *from,
                len: self.at - *from,
            };
            // The receiver lives as long as this.
            let _ = sender.send(written);
            *from = self.at;
        }
        Ok(at)
    }
}
