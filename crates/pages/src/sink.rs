//! Where page payload is written to.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use freezeframe_error::{Result, ResultExt, SysExt};
use freezeframe_image::ImageWriter;

use crate::PAGE;

/// One page file, appended to.
#[derive(Debug)]
pub(crate) struct PageSink {
    file: File,
    number: u32,
    path: PathBuf,
    at: u64,
}

impl PageSink {
    pub(crate) fn new(writer: &mut ImageWriter) -> Result<PageSink> {
        let pages = writer.new_pages()?;
        Ok(PageSink {
            path: writer.pages_path(pages.number),
            file: pages.file,
            number: pages.number,
            at: 0,
        })
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Appends bytes, if so wanted on a page boundary; gives their offset.
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
