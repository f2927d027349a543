//! Where the bytes of an image went.

use crate::PAGE;
use crate::index::{MAX_BLOCK_PAGES, PageStats, Range, What, within};
use crate::reader::PageReader;

/// Counts what is stored of ranges, each stored page once: whoever is asked
/// about first has it, for the others it is a duplicate.
#[derive(Debug)]
pub struct Ledger<'a> {
    reader: &'a PageReader,
    /// A bit for each page of each block.
    counted: Vec<[u64; (MAX_BLOCK_PAGES / 64) as usize]>,
}

impl<'a> Ledger<'a> {
    /// Nothing is counted yet.
    pub fn new(reader: &'a PageReader) -> Ledger<'a> {
        Ledger {
            reader,
            counted: vec![[0; (MAX_BLOCK_PAGES / 64) as usize]; reader.blocks().len()],
        }
    }

    /// What is stored of `range`. Of a compressed block each page has the same share.
    pub fn count(&mut self, mm: u64, range: Range) -> PageStats {
        let mut stats = PageStats::default();
        for e in within(self.reader.extents(mm), range.clone()) {
            let (start, end) = (e.addr.max(range.start), e.end().min(range.end));
            stats.add(&e.what, end - start);
            let What::Data { block, page } = e.what else {
                continue;
            };
            let about = &self.reader.blocks()[block as usize];
            let counted = &mut self.counted[block as usize];
            let first = u64::from(page) + (start - e.addr) / PAGE;
            let mut new = 0;
            for page in first..first + (end - start).div_ceil(PAGE) {
                let bit = 1 << (page % 64);
                let Some(word) = counted.get_mut((page / 64) as usize) else {
                    continue;
                };
                new += u64::from(*word & bit == 0);
                *word |= bit;
            }
            stats.duplicate += (end - start).saturating_sub(new * PAGE);
            stats.written += about.stored * new / u64::from(about.pages).max(1);
        }
        stats
    }
}
