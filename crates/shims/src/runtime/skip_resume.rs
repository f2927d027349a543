//! The mark that a container was checkpointed, so that nobody resumes it.
//!
//! A container manager pauses a container, has the runtime checkpoint it and then resumes it, which must fail where
//! the checkpoint has ended the container or let it go. A shim that finds the mark leaves the resume out. The mark is
//! the file `NAMESPACE/ID` in a directory that is empty after a boot.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use freezeframe::{Error, Result};
use freezeframe_error::{ResultExt, SysExt};
use tempfile::NamedTempFile;

use super::flags::{is_component, usage};

/// Where marks are kept unless told otherwise.
pub const DEFAULT_DIR: &str = "/run/freezeframe/skip-resume";

/// The mark of one container.
#[derive(Clone, Debug)]
pub struct SkipResume {
    file: PathBuf,
}

impl SkipResume {
    /// That of the container `id` in `namespace`. Both are names of files: no `/`, no `..`.
    pub fn of(dir: &Path, namespace: &str, id: &str) -> Result<SkipResume> {
        if let Some(bad) = [namespace, id].into_iter().find(|name| !is_component(name)) {
            return Err(usage(format!(
                "'{bad}' is no name of a namespace or container"
            )));
        }
        Ok(SkipResume {
            file: dir.join(namespace).join(id),
        })
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// Sets it: by a file that is flushed to the disk and then renamed, so that there is all of it or nothing.
    pub fn set(&self) -> Result<()> {
        self.put()
            .on(self.file.display())
            .context("the skip-resume mark cannot be set")
    }

    fn put(&self) -> Result<()> {
        let dir = self
            .file
            .parent()
            .ok_or_else(|| Error::bug("a mark without a directory"))?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .sys("mkdir")?;
        let new = NamedTempFile::with_prefix_in(".new-", dir).sys("open")?;
        new.as_file().sync_all().sys("fsync")?;
        new.persist(&self.file).map_err(|e| e.error).sys("rename")?;
        File::open(dir).and_then(|d| d.sync_all()).sys("fsync")
    }

    /// Whether it is set.
    pub fn is_set(&self) -> Result<bool> {
        let there = self.file.try_exists().sys("stat").on(self.file.display());
        there.context("the skip-resume mark cannot be read")
    }

    /// Takes it away; whether it was set.
    pub fn take(&self) -> Result<bool> {
        match fs::remove_file(&self.file) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e).sys("unlink").on(self.file.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_and_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let of = |namespace, id| SkipResume::of(dir.path(), namespace, id).unwrap();
        let mark = of("k8s.io", "c1");
        assert!(!mark.take().unwrap());
        mark.set().unwrap();
        mark.set().unwrap();
        assert!(mark.is_set().unwrap());
        assert!(!of("moby", "c1").is_set().unwrap() && !of("k8s.io", "c2").is_set().unwrap());
        assert_eq!(fs::read_dir(dir.path().join("k8s.io")).unwrap().count(), 1);
        assert!(mark.take().unwrap());
        assert!(!mark.take().unwrap());
    }

    #[test]
    fn names_stay_inside_the_directory() {
        for (namespace, id) in [("..", "c"), ("n", "../c"), ("", "c"), ("n", ".")] {
            assert!(SkipResume::of(Path::new("/tmp"), namespace, id).is_err());
        }
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("n"), "").unwrap();
        let error = SkipResume::of(dir.path(), "n", "c")
            .unwrap()
            .set()
            .unwrap_err();
        assert!(error.message().contains("skip-resume"), "{error:?}");
    }
}
