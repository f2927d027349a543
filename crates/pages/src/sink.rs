//! Where page payload is written to.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use freezeframe_error::{Result, ResultExt, SysExt};
use freezeframe_image::ImageWriter;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::PAGE;

/// One page file, appended to by one thread: writers of one file wait for each
/// other in the kernel.
#[derive(Debug)]
pub(crate) struct PageSink {
    file: File,
    number: u32,
    path: PathBuf,
    at: u64,
    direct: bool,
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
            file: pages.file,
            number: pages.number,
            at: 0,
            direct,
        })
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
        Ok(at)
    }
}
