//! Holding off the packets of a tree's TCP connections, while their ends do not
//! answer: [`freezeframe_sys::nft`] has how.
//!
//! From before a dump reads them until the tree is dead a table that goes with
//! us holds them off (`freezeframe-PID`): whatever becomes of us, it is gone.
//! Then, in one transaction, a table that stays takes its place, named by the
//! image (`freezeframe-IMAGE`). The restore of that image deletes it, after its
//! sockets are what they were; whoever gives the image up does so by
//! `nft delete table inet freezeframe-IMAGE`. Its elements end by themselves
//! after an hour: by then peers that had something to say have given up. What is
//! empty then is deleted by the next dump or restore.

use std::os::fd::BorrowedFd;

use freezeframe_error::{Kind, Result};
use freezeframe_sys::nft::{Connection, Keep, Nft};

/// How long connections are held off between dump and restore.
const KEEP: Keep = Keep::Seconds(3600);

const PREFIX: &str = "freezeframe-";

/// Connections that are held off for as long as this is there.
#[derive(Debug)]
pub struct Hold {
    nft: Nft,
    name: String,
    connections: Vec<Connection>,
}

impl Hold {
    /// Holds them off from here on.
    pub fn start(connections: Vec<Connection>) -> Result<Hold> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let start = || {
            let mut nft = Nft::open()?;
            sweep(&mut nft);
            let note = "held off while frozen or being restored";
            nft.hold(&name, note, Keep::Owned, &connections, &[])?;
            Ok(nft)
        };
        let nft = start().map_err(|e: freezeframe_error::Error| {
            let lacks = e.kind() == Kind::KernelLacks;
            let e = e.context("the packets of TCP connections cannot be held off");
            if lacks {
                e.context("nf_tables is needed (or --network-lock skip)")
            } else {
                e
            }
        })?;
        Ok(Hold {
            nft,
            name,
            connections,
        })
    }

    /// Goes on without us, until the image is restored: from when `by` has sent
    /// the bytes it is given.
    pub fn stay(
        mut self,
        image: &str,
        by: impl FnOnce(BorrowedFd<'_>, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let name = format!("{PREFIX}{image}");
        let note = note(image);
        self.nft
            .hold_by(&name, &note, KEEP, &self.connections, &[&self.name], by)
    }

    /// Holds more off until the image is restored.
    pub fn also(image: &str, connections: &[Connection]) -> Result<()> {
        let name = format!("{PREFIX}{image}");
        let mut nft = Nft::open()?;
        match nft.hold_more(&name, KEEP, connections) {
            Err(e) if e.errno() == Some(libc::ENOENT) => {
                nft.hold(&name, &note(image), KEEP, connections, &[])
            }
            other => other,
        }
    }

    /// Ends, and what was held off for the image too. Other images of the same
    /// connections have lost them.
    pub fn end(mut self, image: &str) -> Result<()> {
        end_of_image(&mut self.nft, image)?;
        for other in of_images(&mut self.nft)? {
            match self.nft.let_go(&other, &self.connections) {
                Err(e) if e.errno() == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
        sweep(&mut self.nft);
        self.nft.delete(&self.name)
    }
}

fn note(image: &str) -> String {
    format!("held off until image {image} is restored, or an hour is over")
}

/// Ends what a dump that was killed may have left for its image. Where that cannot
/// be, there is nothing.
pub fn forget(image: &str) {
    if let Ok(mut nft) = Nft::open() {
        let _ = end_of_image(&mut nft, image);
    }
}

/// Ends what an image's dump has left, if anything.
fn end_of_image(nft: &mut Nft, image: &str) -> Result<()> {
    match nft.delete(&format!("{PREFIX}{image}")) {
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// The tables that dumps have left for their images.
fn of_images(nft: &mut Nft) -> Result<Vec<String>> {
    let mut names = nft.tables()?;
    names.retain(|name| {
        name.strip_prefix(PREFIX)
            .is_some_and(|image| image.len() == 32)
    });
    Ok(names)
}

/// Deletes tables of images that hold nothing off any more. That it fails is nobody's concern.
fn sweep(nft: &mut Nft) {
    for name in of_images(nft).unwrap_or_default() {
        if nft.is_empty(&name).unwrap_or(false) {
            let _ = nft.delete(&name);
        }
    }
}
