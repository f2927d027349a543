//! Page-aligned memory of our own.

use freezeframe_error::{Error, Result};
use memmap2::{Advice, MmapMut};

use crate::PAGE;

/// A mapping: aligned for O_DIRECT, and taking no memory before it is used.
#[derive(Debug)]
pub(crate) struct Buffer(MmapMut);

impl Buffer {
    /// `len` bytes, zero.
    pub(crate) fn new(len: usize) -> Result<Buffer> {
        let map = MmapMut::map_anon(len.max(1)).map_err(|e| Error::io("mmap", e))?;
        // Fewer faults; without huge pages it works as well.
        let _ = map.advise(Advice::HugePage);
        Ok(Buffer(map))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// Makes the first `len` bytes present.
    pub(crate) fn touch(&mut self, len: usize) {
        for page in self
            .0
            .chunks_mut(PAGE as usize)
            .take(len.div_ceil(PAGE as usize))
        {
            page[0] = 0;
        }
    }
}
