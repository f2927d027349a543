//! Reading the same thing of many, by as many threads as there are CPUs.

use std::num::NonZero;
use std::thread::{available_parallelism, scope};

/// Fewer items than this are not worth a thread.
const WORTH: usize = 64;

/// `f` of each item, in order. It must not use ptrace: that belongs to the
/// calling thread.
pub(crate) fn map<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    map_from(WORTH, items, f)
}

/// The same, for items that are each as much work as several.
pub(crate) fn map_large<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    map_from(WORTH / 8, items, f)
}

fn map_from<T: Sync, R: Send>(worth: usize, items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = match items.len() < worth {
        true => 1,
        false => available_parallelism().map_or(1, NonZero::get),
    };
    let part = items.len().div_ceil(threads).max(1);
    let (mine, others) = items.split_at(part.min(items.len()));
    let f = &f;
    scope(|scope| {
        let others: Vec<_> = others
            .chunks(part)
            .map(|part| {
                (
                    part,
                    std::thread::Builder::new().spawn_scoped(scope, move || run(part, f)),
                )
            })
            .collect();
        let mut results = run(mine, f);
        for (part, thread) in others {
            match thread.map(|t| t.join()) {
                Ok(Ok(done)) => results.extend(done),
                Ok(Err(panic)) => std::panic::resume_unwind(panic),
                // No thread to be had: it is only slower.
                Err(_) => results.extend(run(part, f)),
            }
        }
        results
    })
}

/// `other` in a thread of its own while `mine`, which is about so many items, runs in this one,
/// which alone may use ptrace. For few it is not worth a thread.
pub(crate) fn beside<A: Send, B>(
    items: usize,
    other: impl Fn() -> A + Send + Sync,
    mine: impl FnOnce() -> B,
) -> (A, B) {
    if items < WORTH {
        let mine = mine();
        return (other(), mine);
    }
    scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, &other);
        let mine = mine();
        let other = match thread.map(|t| t.join()) {
            Ok(Ok(done)) => done,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(_) => other(),
        };
        (other, mine)
    })
}

fn run<T, R>(items: &[T], f: &impl Fn(&T) -> R) -> Vec<R> {
    items.iter().map(f).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn in_order() {
        for n in [0, 1, 2, 3, 63, 64, 65, 1000] {
            let items: Vec<usize> = (0..n).collect();
            let want: Vec<usize> = (0..n).map(|i| i * 2).collect();
            assert_eq!(super::map(&items, |i| i * 2), want);
            assert_eq!(super::map_large(&items, |i| i * 2), want);
        }
    }
}
