//! Pages that an address space has in common with a relative's since a fork.

use freezeframe_error::Result;
use freezeframe_sys::pagemap::{entry, migrated_pages};

use crate::PAGE;
use crate::index::Range;
use crate::source::{Piece, Source, pages_of};

/// What is known of a page's sharing, from the page tables alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// The two do not have this page in common.
    Not,
    /// They may: their contents decide.
    Maybe,
    /// Both map the same frame, if nothing was moved meanwhile; see [`Watch`].
    OneFrame,
}

/// What two pagemap entries for one address say. Frames that differ, or places
/// in swap that do, are of different pages.
pub(crate) fn sharing(own: u64, other: u64) -> Sharing {
    let used = entry::PRESENT | entry::SWAPPED;
    let strange = entry::FILE | entry::GUARD;
    if own & used == 0 || other & used == 0 || (own | other) & strange != 0 {
        return Sharing::Not;
    }
    let (a, b) = (own & entry::PFN, other & entry::PFN);
    let alike = own & used == other & used;
    if alike && a != 0 && b != 0 && a != b {
        return Sharing::Not;
    }
    let present = own & used == entry::PRESENT && alike;
    let exclusive = (own | other) & entry::EXCLUSIVE != 0;
    if present && a != 0 && a == b && !exclusive {
        Sharing::OneFrame
    } else {
        Sharing::Maybe
    }
}

/// Whether frames could have been confused while they were looked at.
///
/// That two stopped processes showed the same frame number, one after the
/// other, proves that they share a page only if the frame held the same page
/// both times: pages migrate. So the relative's entries are read before (t1)
/// and after (t3) the other's (t2), and must not have changed; and the
/// kernel's count of migrated pages, read before t1 and after t3, must not
/// have either. Then the relative's page was in its frame all the time:
///
/// - Of what moves pages, only migration can bring one back to a frame it had
///   left. A page that is swapped out, merged (KSM) or collapsed into a huge
///   page stays so while nobody touches it, and its owner is stopped; it would
///   show at t3.
/// - To be taken in, we would have to miss four migrations in this order: the
///   relative's page out of the frame, the other's page in, that one out, and
///   the first one back. The kernel counts when a batch of migrations ends, and
///   no batch moves a page twice: at least two batches of two threads would
///   have to swap exactly these two pages with each other, twice, within the
///   few ms between t1 and t3, and both be at work still after t3.
///
/// With as much as one counted migration anywhere in the system the frames are
/// not believed and contents are compared.
#[derive(Debug)]
pub(crate) struct Watch {
    before: Option<u64>,
}

impl Watch {
    /// Begins to watch.
    pub(crate) fn begin() -> Watch {
        Watch {
            before: migrated_pages(),
        }
    }

    /// Whether no page was migrated since; not where the kernel does not say.
    pub(crate) fn is_quiet(&self) -> bool {
        self.before.is_some() && self.before == migrated_pages()
    }
}

/// The relative's entries for the runs of its relatives, kept for as long as
/// they are compared with them.
#[derive(Debug)]
pub(crate) struct Entries {
    pub(crate) ranges: Vec<Range>,
    entries: Vec<u64>,
}

impl Entries {
    /// Reads those of `ranges`, which are sorted.
    pub(crate) fn read(source: &Source, ranges: &[Range]) -> Result<Entries> {
        let pieces: Vec<Piece> = ranges
            .iter()
            .map(|r| (r.start, (r.end - r.start) as usize))
            .collect();
        Ok(Entries {
            entries: source.entries(&pieces)?,
            ranges: ranges.to_vec(),
        })
    }

    /// For each page of `pieces` (sorted by address) its entry; 0 outside of the ranges.
    pub(crate) fn of(&self, pieces: &[Piece]) -> Vec<u64> {
        let mut out = Vec::new();
        let (mut range, mut before) = (0, 0);
        for addr in pages_of(pieces) {
            while self.ranges.get(range).is_some_and(|r| r.end <= addr) {
                let r = &self.ranges[range];
                before += ((r.end - r.start) / PAGE) as usize;
                range += 1;
            }
            let entry = match self.ranges.get(range) {
                Some(r) if r.start <= addr => self
                    .entries
                    .get(before + ((addr - r.start) / PAGE) as usize),
                _ => None,
            };
            out.push(entry.copied().unwrap_or_default());
        }
        out
    }

    /// Whether another reading of the same ranges saw the same frames.
    pub(crate) fn is_as(&self, other: &Entries) -> bool {
        self.entries == other.entries
    }
}

/// For each page of what was read into `buf` whether the relative has the same
/// bytes at the same address, where `maybe`. `theirs` is a buffer for its pages.
pub(crate) fn same_contents(
    relative: &Source,
    pieces: &[Piece],
    maybe: &[bool],
    buf: &[u8],
    theirs: &mut Vec<u8>,
) -> Result<Vec<bool>> {
    let page = PAGE as usize;
    let mut wanted = Vec::<Piece>::new();
    for (addr, _) in pages_of(pieces).zip(maybe).filter(|(_, maybe)| **maybe) {
        match wanted.last_mut() {
            Some((start, len)) if *start + *len as u64 == addr => *len += page,
            _ => wanted.push((addr, page)),
        }
    }
    theirs.resize(wanted.iter().map(|w| w.1).sum(), 0);
    let entries = relative.entries(&wanted)?;
    relative.read(&wanted, &entries, theirs, false)?;
    let mut theirs = theirs.chunks_exact(page);
    let pages = maybe.iter().zip(buf.chunks_exact(page));
    Ok(pages
        .map(|(&maybe, ours)| maybe && theirs.next() == Some(ours))
        .collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_entries_say() {
        let (present, swapped) = (entry::PRESENT, entry::SWAPPED);
        for (own, other, expected) in [
            (present | 5, present | 5, Sharing::OneFrame),
            (present | 5, present | 6, Sharing::Not),
            (present | 5, 0, Sharing::Not),
            (present | 5, present | entry::FILE | 5, Sharing::Not),
            (present | 5, swapped | entry::GUARD, Sharing::Not),
            // Frames that we may not see.
            (present, present, Sharing::Maybe),
            // One of them was swapped out, or is being migrated.
            (present | 5, swapped | 77, Sharing::Maybe),
            (swapped | 77, swapped | 77, Sharing::Maybe),
            (swapped | 77, swapped | 78, Sharing::Not),
            // One frame that only one process maps: seen at two times.
            (present | 5, present | entry::EXCLUSIVE | 5, Sharing::Maybe),
        ] {
            assert_eq!(sharing(own, other), expected, "{own:x} {other:x}");
        }
    }

    /// One byte makes a difference, and only pages that may be the same are looked at.
    #[test]
    fn contents_decide() {
        let page = PAGE as usize;
        let mut theirs = crate::buffer::Buffer::new(4 * page).unwrap();
        theirs.as_mut().fill(7);
        let addr = theirs.as_mut().as_ptr() as u64;
        let mut ours = vec![7; 4 * page];
        ours[2 * page - 1] = 8;
        let this = Source::open(freezeframe_sys::Pid::this()).unwrap();
        let pieces = [(addr, page), (addr + PAGE, 3 * page)];
        let maybe = [true, true, false, true];
        let same = same_contents(&this, &pieces, &maybe, &ours, &mut Vec::new()).unwrap();
        assert_eq!(same, [true, false, false, true]);
    }

    #[test]
    fn entries_of_pages() {
        let entries = Entries {
            ranges: vec![4096..12288, 20480..24576],
            entries: vec![1, 2, 5],
        };
        let all = entries.of(&[(0, 4096), (8192, 8192), (20480, 8192)]);
        assert_eq!(all, [0, 2, 0, 5, 0]);
    }
}
