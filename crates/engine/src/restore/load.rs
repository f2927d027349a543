//! Reading an image, and checking that it holds together before anything is created.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{Image, RawRecord, Tag};
use freezeframe_kinds::model::{
    self, Contents, FdTable, FileId, Mm, ObjectId, OpenFile, Process, Tree,
};
use freezeframe_kinds::{plugin, registry};
use serde::de::DeserializeOwned;

/// The end of user space with four-level page tables.
pub(crate) const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// An image, decoded and checked.
#[derive(Debug)]
pub struct Loaded {
    /// The image itself.
    pub image: Image,
    /// What it is of.
    pub tree: Tree,
    /// Parents before children.
    pub procs: Vec<Process>,
    /// Address spaces, by id.
    pub spaces: HashMap<u64, Mm>,
    /// Descriptor tables, by PID.
    pub tables: HashMap<i32, FdTable>,
    /// Open files.
    pub files: BTreeMap<FileId, OpenFile>,
    records: HashMap<(Tag, u64), usize>,
}

impl Loaded {
    /// Opens and checks the image in `dir`.
    pub fn open(dir: &Path) -> Result<Loaded> {
        Loaded::of(Image::open(dir)?)
    }

    /// Checks an image.
    pub fn of(image: Image) -> Result<Loaded> {
        let known: Vec<Tag> = registry::all()
            .map(|(_, about)| about.tag)
            .chain([
                model::TREE,
                model::PROCESS,
                model::THREAD,
                model::MM,
                model::FDS,
                model::FILE,
                plugin::TREE_STATE,
            ])
            .chain([
                freezeframe_pages::PAGE_INDEX,
                freezeframe_pages::PAGE_BLOCKS,
            ])
            .collect();
        image.refuse_unknown(&known)?;
        let mut records = HashMap::new();
        for (i, r) in image.records().iter().enumerate() {
            records.entry((r.tag, r.subject)).or_insert(i);
        }
        let tree: Tree = one(&image, model::TREE)?;
        let procs: Vec<Process> = all(&image, model::PROCESS)?
            .into_iter()
            .map(|(_, p)| p)
            .collect();
        let spaces: HashMap<u64, Mm> = all(&image, model::MM)?.into_iter().collect();
        let tables = all(&image, model::FDS)?
            .into_iter()
            .map(|(pid, t)| (pid as i32, t))
            .collect();
        let files = all(&image, model::FILE)?
            .into_iter()
            .map(|(id, f)| (FileId(id as u32), f))
            .collect();
        let loaded = Loaded {
            image,
            tree,
            procs,
            spaces,
            tables,
            files,
            records,
        };
        loaded.check()?;
        Ok(loaded)
    }

    /// The record of a kind with this subject.
    pub fn record(&self, tag: Tag, subject: u64) -> Option<&RawRecord> {
        self.records
            .get(&(tag, subject))
            .and_then(|i| self.image.records().get(*i))
    }

    /// The record of a file's kind.
    pub fn file_record(&self, id: FileId) -> Result<&RawRecord> {
        self.files
            .get(&id)
            .and_then(|f| self.record(f.kind, u64::from(id.0)))
            .ok_or_else(|| Error::corrupt(format!("file {} has no record", id.0)))
    }

    /// The record of a memory object.
    pub fn object_record(&self, kind: Tag, id: ObjectId) -> Result<&RawRecord> {
        self.record(kind, u64::from(id.0))
            .ok_or_else(|| Error::corrupt(format!("memory object {} has no record", id.0)))
    }

    fn check(&self) -> Result<()> {
        check_depth(&self.procs)?;
        let mut ids = HashSet::new();
        for p in &self.procs {
            let pid = *p
                .pids
                .first()
                .ok_or_else(|| Error::corrupt("a process without a PID"))?;
            let bad = |what: &str| Err(Error::corrupt(what.to_string()).on_task(pid));
            if p.pids.iter().chain(&p.threads).any(|id| *id <= 0) {
                return bad("a PID or TID is not positive");
            }
            if !p.is_alive() {
                if !ids.insert(pid) {
                    return bad("its PID is used twice");
                }
                continue;
            }
            if p.threads.first() != Some(&pid) {
                return bad("its first thread does not have its PID");
            }
            if !p.threads.iter().all(|t| ids.insert(*t)) {
                return bad("one of its TIDs is used twice");
            }
            let Some(space) = self.spaces.get(&p.mm) else {
                return bad("it has no memory in the image");
            };
            check_space(space).map_err(|e| e.on_task(pid))?;
            for vma in &space.vmas {
                if registry::memory(vma.kind).is_none() {
                    return bad("a VMA of an unknown kind");
                }
                self.object_record(vma.kind, vma.object)?;
            }
            let Some(table) = self.tables.get(&pid) else {
                return bad("it has no descriptor table in the image");
            };
            let mut last = -1;
            for entry in &table.fds {
                if entry.fd <= last || !self.files.contains_key(&entry.file) {
                    return bad("its descriptor table is malformed");
                }
                last = entry.fd;
            }
        }
        let alive = self.procs.iter().filter(|p| p.is_alive());
        let alive: HashSet<i32> = alive.map(Process::pid).collect();
        for (id, file) in &self.files {
            if registry::file(file.kind).is_none() {
                return Err(Error::corrupt(format!(
                    "file {} is of an unknown kind",
                    id.0
                )));
            }
            if !alive.contains(&file.seen_at.0) {
                let what = format!("file {} was seen at a process that is not there", id.0);
                return Err(Error::corrupt(what).on(&file.name));
            }
            self.file_record(*id)?;
        }
        if self.procs.first().map(Process::pid) != Some(self.tree.root) {
            return Err(Error::corrupt(
                "the first process is not the root of the tree",
            ));
        }
        Ok(())
    }

    /// A page-aligned hole of `len` bytes in every process of the tree.
    pub fn hole(&self, len: u64) -> Result<u64> {
        let mut taken: Vec<(u64, u64)> = self
            .spaces
            .values()
            .flat_map(|s| s.vmas.iter().map(|v| (v.start, v.end)))
            .collect();
        taken.sort_unstable();
        // Stacks may want to grow downwards into what is free below them.
        let slack = 64 << 20;
        let mut at: u64 = 0x1000_0000_0000;
        for (start, end) in taken {
            if end <= at {
                continue;
            }
            if start >= at + len + slack {
                break;
            }
            at = end.next_multiple_of(1 << 21) + slack;
        }
        if at + len + slack > TASK_SIZE {
            return Err(Error::new(
                Kind::NoSpace,
                "no hole for the restore stub in the address spaces of the image",
            ));
        }
        Ok(at)
    }
}

/// How deep processes may lie below the root: what follows the tree down takes room on its stack.
const DEEPEST: u32 = 1000;

fn check_depth(procs: &[Process]) -> Result<()> {
    let mut depths: HashMap<i32, u32> = HashMap::new();
    for p in procs {
        let above = depths.get(&p.ppid).copied().unwrap_or(0);
        if above == DEEPEST {
            let what = format!("there are more than {DEEPEST} processes, each below the other");
            return Err(Error::corrupt(what));
        }
        depths.extend(p.pids.first().map(|pid| (*pid, above + 1)));
    }
    Ok(())
}

fn check_space(space: &Mm) -> Result<()> {
    let mut last = 0;
    for v in &space.vmas {
        let aligned = [v.start, v.end, v.offset].iter().all(|n| n % 4096 == 0);
        let vsyscall = v.start >= 1 << 63 && v.contents == Contents::Elsewhere;
        if !aligned || v.start < last || v.end <= v.start || (v.end > TASK_SIZE && !vsyscall) {
            return Err(Error::corrupt(format!(
                "the VMA at {:x} is malformed",
                v.start
            )));
        }
        if v.guards
            .iter()
            .any(|&(at, len)| at < v.start || at.checked_add(len).is_none_or(|end| end > v.end))
        {
            return Err(Error::corrupt(format!(
                "a guard region of the VMA at {:x} is outside it",
                v.start
            )));
        }
        last = v.end;
    }
    Ok(())
}

fn decode<T: DeserializeOwned>(record: &RawRecord) -> Result<T> {
    if record.version != model::VERSION {
        return Err(Error::new(
            Kind::ImageVersion,
            format!(
                "version {} of a {:?} record is not known",
                record.version, record.tag
            ),
        ));
    }
    freezeframe_image::decode(&record.body)
}

fn one<T: DeserializeOwned>(image: &Image, tag: Tag) -> Result<T> {
    let mut found = image.all(tag);
    match (found.next(), found.next()) {
        (Some(record), None) => decode(record),
        (None, _) => Err(Error::corrupt(format!("the image has no {tag:?} record"))),
        _ => Err(Error::corrupt(format!(
            "the image has several {tag:?} records"
        ))),
    }
}

fn all<T: DeserializeOwned>(image: &Image, tag: Tag) -> Result<Vec<(u64, T)>> {
    image
        .all(tag)
        .map(|r| Ok((r.subject, decode(r)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use freezeframe_kinds::model::Life;

    /// A process, its child, its child's child, ...
    fn chain(len: i32) -> Vec<Process> {
        let one = |pid| Process {
            pids: vec![pid],
            ppid: pid - 1,
            parent_tid: pid - 1,
            pgid: 10,
            sid: 10,
            life: Life::Alive,
            exit_signal: 17,
            comm: String::new(),
            threads: vec![pid],
            mm: 1,
            cow_parent: None,
        };
        (10..10 + len).map(one).collect()
    }

    #[test]
    fn a_tree_is_not_deeper_than_can_be_followed() {
        let deepest = chain(DEEPEST as i32);
        assert!(check_depth(&deepest).is_ok());
        assert!(super::super::plan::plan(&deepest, &HashSet::new()).is_ok());
        assert!(check_depth(&chain(DEEPEST as i32 + 1)).is_err());
    }
}
