//! Where page payload is written to.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use freezeframe_error::{Result, ResultExt, SysExt};
use freezeframe_image::ImageWriter;

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

    /// Appends whole pages; gives their offset.
    pub(crate) fn append(&mut self, pages: &[u8]) -> Result<u64> {
        let at = self.at;
        self.file
            .write_all_at(pages, at)
            .sys("pwrite")
            .on(self.path.display())?;
        self.at += pages.len() as u64;
        Ok(at)
    }
}
