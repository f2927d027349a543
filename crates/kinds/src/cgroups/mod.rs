//! The cgroups that the tree is in, of all hierarchies of versions 1 and 2.
//!
//! They are outside of the tree, and outlive it: so they are carried only if asked for
//! ([`CgroupMode`], criu(8) `--manage-cgroups`). A dump records in which cgroup each task is,
//! and of these cgroups, and of those below that of the tree's root, the settings and owners.
//!
//! A restore makes those that are missing before there is any process, and puts each process
//! into its own as soon as it is there, so that what it takes is charged where it was. If the
//! restore fails, or is killed, those it made are removed.
//!
//! # References
//! cgroups(7), Documentation/admin-guide/cgroup-v1, Documentation/admin-guide/cgroup-v2.rst

mod places;
mod settings;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use freezeframe_error::{Error, Result, ResultExt, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::cgroup::seen;
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::{self, Mount, ProcDir};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::bytes::Bytes;
use crate::cx::{DumpCx, Place, PlaceKind, RestoreOptions};
use crate::file::shown;

/// What becomes of the cgroups of a tree (criu(8) `--manage-cgroups`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupMode {
    /// Nothing: a restored tree is where its restorer is.
    #[default]
    Ignore,
    /// They have to be there; their settings are left alone.
    None,
    /// They have to be there; they get the settings of the image.
    Props,
    /// Those that are missing are made, and get the settings of the image.
    Soft,
    /// Those that are missing are made; all get the settings of the image.
    Full,
    /// They must not be there: all are made.
    Strict,
}

impl CgroupMode {
    /// All, with their names in criu(8).
    pub const ALL: [(&'static str, CgroupMode); 6] = [
        ("ignore", CgroupMode::Ignore),
        ("none", CgroupMode::None),
        ("props", CgroupMode::Props),
        ("soft", CgroupMode::Soft),
        ("full", CgroupMode::Full),
        ("strict", CgroupMode::Strict),
    ];
}

/// Another cgroup, at a restore, for that of the tree's root (criu(8) `--cgroup-root`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupRoot {
    /// A controller of the hierarchy, or its `name=NAME`; none for all that are not named.
    pub controller: Option<String>,
    /// Its path below the hierarchy's root.
    pub path: PathBuf,
}

/// See the module.
#[derive(Debug)]
pub struct Cgroups;

static ABOUT: About = About {
    tag: Tag::new(*b"CGRP"),
    version: 1,
    name: "cgroups",
    title: "Cgroups of the tree",
    manual: "cgroups(7)",
    since: "",
    carried: "with `--manage-cgroups`: in which cgroup of each hierarchy (version 1 or 2) each process and thread is; of these cgroups, and of all below that of the tree's root, owners and settings (limits, weights, CPUs, devices of version 1, controllers switched on), set before anything is in them. Without the option a restored tree is where its restorer is",
    refused: "a cgroup in a hierarchy that is not mounted here (\"is not seen from here\"); at a restore, a hierarchy that is not there, a setting that this kernel does not take. Not carried: devices of version 2 (a BPF program of whoever made it), accounts of what has been used, whether one is frozen, notifications (`cgroup.event_control`)",
    programs: &["cgroups::apart"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    hierarchies: Vec<Hierarchy>,
    /// Who is elsewhere than the tree's root: TID, and a number in `dirs` of each hierarchy.
    others: Vec<(i32, Vec<u32>)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Hierarchy {
    /// As /proc/PID/cgroup has them, with commas between; empty for version 2.
    controllers: String,
    /// First that of the tree's root; parents before their children.
    dirs: Vec<Dir>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Dir {
    /// Below the root of the hierarchy, as /proc/PID/cgroup has it.
    path: Bytes,
    mode: u32,
    owner: (u32, u32),
    /// Files that are not root's, with their owners: the cgroup was delegated.
    files: Vec<(String, (u32, u32))>,
    /// Files with what was in them, in the order in which they are written.
    settings: Vec<(String, String)>,
}

impl PlaceKind for Cgroups {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn dump(&self, cx: &mut DumpCx<'_>, blockers: &mut Vec<Error>) -> Result<()> {
        if cx.options.cgroups == CgroupMode::Ignore {
            return Ok(());
        }
        let mounts = ProcDir::open(Pid::this())?.mountinfo()?;
        let mut tree = Tree {
            mounts: &mounts,
            hierarchies: Vec::new(),
        };
        let of_root = sorted(cx.procs[0].dir.cgroups()?);
        for line in &of_root {
            tree.add_hierarchy(line)
                .or_else(|e| block(e, cx.procs[0].pid.0, blockers))?;
        }
        let mut others = Vec::new();
        for proc in cx.procs.iter().filter(|p| !p.tids.is_empty()) {
            for tid in &proc.tids {
                let lines = match tid.0 == proc.pid.0 {
                    true => proc.dir.cgroups()?,
                    false => proc.dir.cgroups_of(*tid)?,
                };
                let lines = sorted(lines);
                if lines == of_root {
                    continue;
                }
                match tree.place(&lines) {
                    Ok(place) => others.push((tid.0, place)),
                    Err(e) => block(e, tid.0, blockers)?,
                }
            }
        }
        let hierarchies = tree.hierarchies.into_iter().map(|(_, h)| h).collect();
        let record = Record {
            hierarchies,
            others,
        };
        cx.records.push(ABOUT.record(0, &record)?);
        Ok(())
    }

    fn prepare(
        &self,
        records: &[&RawRecord],
        options: &RestoreOptions,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Box<dyn Place>>> {
        if options.cgroups == CgroupMode::Ignore {
            return Ok(None);
        }
        let Some(record) = records.first() else {
            let what = "the image has no cgroups: it was made without --manage-cgroups";
            warnings.push(what.to_owned());
            return Ok(None);
        };
        let record: Record = ABOUT.decode(record)?;
        let places = places::Places::make(record, options)?;
        Ok(Some(Box::new(places)))
    }
}

/// What is refused is one blocker of many.
fn block(e: Error, task: i32, blockers: &mut Vec<Error>) -> Result<()> {
    blockers.push(e.on_task(task));
    Ok(())
}

/// The lines of /proc/PID/cgroup in one order, whoever reads them.
fn sorted(mut lines: Vec<proc::Cgroup>) -> Vec<proc::Cgroup> {
    lines.sort_by_key(|line| line.hierarchy);
    lines
}

fn names(line: &proc::Cgroup) -> String {
    line.controllers.join(",")
}

/// The cgroups that have been seen.
struct Tree<'a> {
    mounts: &'a [Mount],
    hierarchies: Vec<(proc::Cgroup, Hierarchy)>,
}

impl Tree<'_> {
    fn add_hierarchy(&mut self, line: &proc::Cgroup) -> Result<()> {
        let controllers = names(line);
        let mut dirs = Vec::new();
        match seen(self.mounts, line) {
            // All of the machine is below the root of all.
            Some((_, own)) if line.path == b"/" => dirs.push(Dir::bare(&own, &line.path)?),
            Some((_, own)) => Dir::walk(&own, &line.path, &mut dirs)?,
            // Of a hierarchy that nobody here uses.
            None if line.path == b"/" => return Ok(()),
            None => return Err(unseen(line)),
        }
        let hierarchy = Hierarchy { controllers, dirs };
        self.hierarchies.push((line.clone(), hierarchy));
        Ok(())
    }

    /// The numbers of the cgroups that a task is in.
    fn place(&mut self, lines: &[proc::Cgroup]) -> Result<Vec<u32>> {
        let mut place = Vec::new();
        for (of_root, hierarchy) in &mut self.hierarchies {
            let line = lines.iter().find(|l| l.hierarchy == of_root.hierarchy);
            let line = line.unwrap_or(of_root);
            let dirs = &mut hierarchy.dirs;
            let known = dirs.iter().position(|d| d.path.0 == line.path);
            if known.is_none() {
                let (_, own) = seen(self.mounts, line).ok_or_else(|| unseen(line))?;
                dirs.push(Dir::look(&own, &line.path)?);
            }
            place.push(known.unwrap_or(dirs.len() - 1) as u32);
        }
        let not_kept = |l: &&proc::Cgroup| {
            let mut kept = self.hierarchies.iter();
            l.path != b"/" && !kept.any(|(of_root, _)| of_root.hierarchy == l.hierarchy)
        };
        match lines.iter().find(not_kept) {
            Some(line) => Err(unseen(line)),
            None => Ok(place),
        }
    }
}

fn unseen(line: &proc::Cgroup) -> Error {
    let what = "its cgroup is not seen from here (is the hierarchy mounted?): not supported";
    Error::unsupported(what).on(format!("{}:{}", names(line), shown(&line.path)))
}

impl Dir {
    /// It and all below it.
    fn walk(own: &Path, path: &[u8], all: &mut Vec<Dir>) -> Result<()> {
        all.push(Dir::look(own, path)?);
        let mut below = BTreeMap::new();
        let entries = fs::read_dir(own).sys("opendir").on(own.display())?;
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                let name = entry.file_name();
                below.insert([path, b"/", name.as_bytes()].concat(), entry.path());
            }
        }
        below
            .iter()
            .try_for_each(|(path, own)| Dir::walk(own, path, all))
    }

    /// Its owner alone.
    fn bare(own: &Path, path: &[u8]) -> Result<Dir> {
        let there = own.metadata().sys("stat").on(own.display())?;
        Ok(Dir {
            path: path.to_vec().into(),
            mode: there.mode() & 0o7777,
            owner: (there.uid(), there.gid()),
            files: Vec::new(),
            settings: Vec::new(),
        })
    }

    fn look(own: &Path, path: &[u8]) -> Result<Dir> {
        let mut dir = Dir::bare(own, path)?;
        let mut files = BTreeMap::new();
        let entries = fs::read_dir(own).sys("opendir").on(own.display())?;
        for entry in entries.flatten() {
            let (Ok(name), Ok(there)) = (entry.file_name().into_string(), entry.metadata()) else {
                continue;
            };
            if there.is_file() {
                files.insert(name, (there.uid(), there.gid()));
            }
        }
        dir.settings = settings::read(own, files.keys())?;
        files.retain(|_, owner| *owner != (0, 0));
        dir.files = files.into_iter().collect();
        Ok(dir)
    }

    fn path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.path))
    }
}
