//! Which parts of the shared region are in use.

use std::collections::BTreeMap;

use freezeframe_error::{Error, Kind, Result};

/// First fit over a range of offsets, in units of 64 bytes.
#[derive(Debug)]
pub(super) struct Arena {
    /// Free ranges: start, length. No two touch.
    free: BTreeMap<usize, usize>,
}

/// A piece in use. To be given back by [`Arena::free`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) at: usize,
    pub(super) len: usize,
}

const UNIT: usize = 64;

impl Arena {
    pub(super) fn new(at: usize, len: usize) -> Arena {
        Arena {
            free: BTreeMap::from([(at.next_multiple_of(UNIT), len / UNIT * UNIT)]),
        }
    }

    pub(super) fn take(&mut self, len: usize) -> Result<Piece> {
        let len = len.max(1).next_multiple_of(UNIT);
        let found = self.free.iter().find(|&(_, &free)| free >= len);
        let Some((&at, &free)) = found else {
            let message = format!("a batch of {len} bytes does not fit in the shells' region");
            return Err(Error::new(Kind::NoSpace, message));
        };
        self.free.remove(&at);
        if free > len {
            self.free.insert(at + len, free - len);
        }
        Ok(Piece { at, len })
    }

    pub(super) fn give_back(&mut self, piece: Piece) {
        let Piece { mut at, mut len } = piece;
        if let Some((&before, &free)) = self.free.range(..at).next_back()
            && before + free == at
        {
            self.free.remove(&before);
            at = before;
            len += free;
        }
        if let Some(after) = self.free.remove(&(at + len)) {
            len += after;
        }
        self.free.insert(at, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_back_whole() {
        let mut arena = Arena::new(64, 1024);
        let a = arena.take(1).unwrap();
        let b = arena.take(65).unwrap();
        let c = arena.take(832).unwrap();
        assert_eq!((a.at, b.at, c.at), (64, 128, 256));
        assert_eq!(arena.take(1).unwrap_err().kind(), Kind::NoSpace);
        arena.give_back(b);
        assert_eq!(arena.take(100).unwrap(), b);
        arena.give_back(b);
        arena.give_back(a);
        arena.give_back(c);
        assert_eq!(arena.free, BTreeMap::from([(64, 1024)]));
    }
}
