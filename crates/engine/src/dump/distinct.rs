//! Which of many are the same, by the kernel's order (kcmp(2)), which may fail.

use std::cmp::Ordering;

use freezeframe_error::Result;

/// One of each, in order.
#[derive(Debug)]
pub(super) struct Distinct<T>(Vec<T>);

impl<T: Copy> Distinct<T> {
    pub(super) fn new() -> Distinct<T> {
        Distinct(Vec::new())
    }

    /// Adds one more; gives the one before it that is the same, if there is one.
    ///
    /// (No sort of all: that may panic where a comparison fails, which has no order to give.)
    pub(super) fn add(
        &mut self,
        new: T,
        order: impl Fn(T, T) -> Result<Ordering>,
    ) -> Result<Option<T>> {
        let mut failed = None;
        let found = self.0.binary_search_by(|known| {
            order(*known, new).unwrap_or_else(|e| {
                failed.get_or_insert(e);
                Ordering::Equal
            })
        });
        match (failed, found) {
            (Some(e), _) => Err(e),
            (None, Ok(at)) => Ok(Some(self.0[at])),
            (None, Err(at)) => {
                self.0.insert(at, new);
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use freezeframe_error::Error;
    use std::cell::Cell;

    #[test]
    fn the_first_of_each_is_found() {
        let order = |a: (u32, char), b: (u32, char)| Ok(a.1.cmp(&b.1));
        let mut all = Distinct::new();
        let text = "freezeframe".chars();
        let firsts = (0..).zip(text).map(|new| all.add(new, order).unwrap());
        let firsts: Vec<_> = firsts.map(|same| same.map(|(at, _)| at)).collect();
        let f = |at| Some(at);
        let wanted = [
            None,
            None,
            None,
            f(2),
            None,
            f(2),
            f(0),
            f(1),
            None,
            None,
            f(2),
        ];
        assert_eq!(firsts, wanted);
    }

    #[test]
    fn a_comparison_that_fails_ends_it() {
        for fails in 0..40 {
            let left = Cell::new(fails);
            let order = |a: i32, b: i32| match left.replace(left.get() - 1) {
                0 => Err(Error::syscall("kcmp", libc::EPERM)),
                _ => Ok(a.cmp(&b)),
            };
            let mut all = Distinct::new();
            let mut each = (0..50).map(|n| all.add(n * 7 % 50, order));
            assert!(each.any(|added| added.is_err()), "{fails}");
        }
    }
}
