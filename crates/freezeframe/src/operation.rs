//! Operations that are awaited (feature `async`).

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use freezeframe_error::{Error, Kind, Result, Target};

use crate::{Cancel, Dump, DumpReport, Restore, Restored, thread};

/// An operation under way, to be awaited: [`Dump::start`], [`Restore::start`], [`Operation::start`].
///
/// It runs on a thread of its own from the beginning, whether it is polled or not, and that thread wakes
/// whoever awaits it: it needs no runtime, and works in any.
///
/// Dropped before its end, it is cancelled ([`Cancel`]), and nobody waits: its thread lets the target
/// go, or ends what it has of a half-built tree, within some milliseconds. If it had done its work by then it
/// comes to its end: the image is complete and a tree that was to end has ended, or the restored tree
/// runs on. Who has to know which it was calls [`cancel`](Operation::cancel) and awaits it.
#[must_use = "dropped, it is cancelled"]
pub struct Operation<T> {
    end: Arc<Mutex<End<T>>>,
    cancel: Cancel,
}

enum End<T> {
    /// Who is to be woken.
    Awaited(Option<Waker>),
    Here(Result<T>),
    Taken,
}

impl<T: Send + 'static> Operation<T> {
    /// Runs `work`, which may block, on a thread of its own in which every signal is blocked. That it is cancelled
    /// is for `work` to heed.
    pub fn start(work: impl FnOnce(Cancel) -> Result<T> + Send + 'static) -> Operation<T> {
        let cancel = Cancel::default();
        let end = Arc::new(Mutex::new(End::Awaited(None)));
        let promise = Promise(Arc::clone(&end));
        let given = cancel.clone();
        let started = thread::start("freezeframe-op", move || {
            promise.keep(thread::guarded(|| work(given)));
        });
        if let Err(e) = started {
            *lock(&end) = End::Here(Err(e));
        }
        Operation { end, cancel }
    }
}

impl<T> Operation<T> {
    /// Asks it to end. Still to be awaited: it tells how the target is, or what was done already.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }
}

impl<T> Future for Operation<T> {
    type Output = Result<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let mut end = lock(&self.end);
        match &mut *end {
            End::Awaited(waker) => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            End::Here(_) | End::Taken => match std::mem::replace(&mut *end, End::Taken) {
                End::Here(result) => Poll::Ready(result),
                _ => Poll::Ready(Err(Error::new(Kind::Usage, "the result was given already"))),
            },
        }
    }
}

impl<T> Drop for Operation<T> {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl<T> fmt::Debug for Operation<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cancel = &self.cancel;
        f.debug_struct("Operation")
            .field("cancel", cancel)
            .finish_non_exhaustive()
    }
}

/// The end of an operation, of which somebody is told in any case.
struct Promise<T>(Arc<Mutex<End<T>>>);

impl<T> Promise<T> {
    fn keep(self, result: Result<T>) {
        self.tell(result);
    }

    fn tell(&self, result: Result<T>) {
        let mut end = lock(&self.0);
        let End::Awaited(waker) = &mut *end else {
            return;
        };
        let waker = waker.take();
        *end = End::Here(result);
        drop(end);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        let e = Error::bug("the operation ended without a result");
        self.tell(Err(e.leaving(Target::Unknown)));
    }
}

/// What it holds is whole whenever it is let go.
fn lock<T>(end: &Mutex<End<T>>) -> MutexGuard<'_, End<T>> {
    end.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Dump {
    /// As [`run`](Dump::run), to be awaited (feature `async`).
    pub fn start(self) -> Operation<DumpReport> {
        Operation::start(move |cancel| self.cancel(&cancel).run())
    }
}

impl Restore {
    /// As [`run`](Restore::run), to be awaited (feature `async`).
    pub fn start(self) -> Operation<Restored> {
        Operation::start(move |cancel| self.cancel(&cancel).run())
    }
}
