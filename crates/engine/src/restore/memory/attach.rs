//! Segments of System V, attached as they were.

use std::collections::BTreeMap;
use std::ops::Range;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_inject::{Arg, Batch};
use freezeframe_kinds::model::{Mm, Vma};
use freezeframe_kinds::{Backing, MakeMapping, Sharing, registry};
use freezeframe_sys::ids::Pid;

use super::super::load::TASK_SIZE;
use super::Memory;
use super::mapping::{Fresh, filling_prot, is_read_only};
use super::setting::mprotect;

/// What one shmat(2) has attached, as far as it is mapped afresh.
struct Attachment<'a> {
    id: i32,
    len: u64,
    vmas: Vec<&'a Vma>,
}

impl Memory<'_> {
    /// Attaches System V segments, in place where all of one is there, else
    /// elsewhere, from where the parts are moved to their places. What is one attachment
    /// stays one, since shmdt(2) ends it as a whole.
    pub(super) fn attach(
        &self,
        batch: &mut Batch,
        pid: Pid,
        space: &Mm,
        fresh: &[Fresh<'_>],
        region: Range<u64>,
    ) -> Result<()> {
        let mut attachments: BTreeMap<_, Attachment<'_>> = BTreeMap::new();
        for vma in fresh.iter().map(|f| f.vma) {
            // Of the tree, and no file: nothing else has a batch to write to.
            let kind = registry::memory(vma.kind).filter(|k| k.sharing() == Sharing::Tree);
            let Some(kind) = kind else {
                continue;
            };
            let mut cx = MakeMapping {
                pid,
                batch,
                options: self.options,
            };
            let record = self.loaded.object_record(vma.kind, vma.object)?;
            if let Backing::Segment { id, len } = kind.backing(&mut cx, record)? {
                if vma
                    .offset
                    .checked_add(vma.len())
                    .is_none_or(|end| end > len)
                {
                    return Err(Error::corrupt("a VMA is behind the end of its segment"));
                }
                let base = vma.start.wrapping_sub(vma.offset);
                let key = (vma.object, base, is_read_only(vma));
                let new = || Attachment {
                    id,
                    len,
                    vmas: Vec::new(),
                };
                attachments.entry(key).or_insert_with(new).vmas.push(vma);
            }
        }
        for ((_, base, read_only), Attachment { id, len, vmas }) in attachments {
            let (flags, prot) = match read_only {
                true => (libc::SHM_RDONLY, libc::PROT_READ as u32),
                false => (0, filling_prot()),
            };
            let whole = vmas.iter().map(|v| v.len()).sum::<u64>() == len;
            let at = match whole {
                true => base,
                false => gap(space, region.clone(), len)?,
            };
            let args = [id.into(), at.into(), flags.into()];
            batch.call(format!("shmat({id}, {at:x})"), libc::SYS_shmat, args);
            for vma in &vmas {
                if !whole {
                    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                    let (from, to) = (at + vma.offset, vma.start);
                    let len = Arg::Imm(vma.len());
                    let args = [from.into(), len, len, flags.into(), to.into()];
                    batch.call(format!("mremap({to:x})"), libc::SYS_mremap, args);
                }
                if vma.prot != prot {
                    mprotect(batch, vma, vma.prot);
                }
            }
            if !whole {
                let args = [at.into(), len.into()];
                batch.call("munmap", libc::SYS_munmap, args);
            }
        }
        Ok(())
    }
}

/// Room of `len` bytes that nothing of an address space takes.
fn gap(space: &Mm, region: Range<u64>, len: u64) -> Result<u64> {
    let mut taken: Vec<Range<u64>> = space.vmas.iter().map(|v| v.start..v.end).collect();
    taken.push(region);
    taken.push(TASK_SIZE..u64::MAX);
    taken.sort_by_key(|r| r.start);
    let mut at: u64 = 1 << 20;
    for r in taken {
        if at.checked_add(len).is_some_and(|end| end <= r.start) {
            return Ok(at);
        }
        at = at.max(r.end);
    }
    Err(Error::new(
        Kind::NoSpace,
        "no room in the address space to attach a segment",
    ))
}
