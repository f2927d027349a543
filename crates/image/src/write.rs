//! Writing an image, and its one commit point.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io::{BufWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt, SysExt};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};
use xxhash_rust::xxh3::Xxh3;

use crate::names::{Entry, METADATA, classify, pages_name, temporary_name};
use crate::record::CRITICAL;
use crate::{
    HEADER_LEN, Header, ImageId, MAX_BODY, MAX_PAGE_FILES, MAX_RECORDS, MAX_TOTAL, RECORD_HEAD_LEN,
    RawRecord, Record, Tag, read,
};

/// An image being written. Dropped before [`commit`](ImageWriter::commit) has
/// returned, it takes away what it made; the image that was in the directory
/// before is untouched until then.
///
/// ```
/// # fn main() -> freezeframe_image::Result<()> {
/// # let dir = tempfile::tempdir().unwrap();
/// # let record = freezeframe_image::RawRecord {
/// #     tag: freezeframe_image::Tag::new(*b"TEST"), version: 1, flags: 0, subject: 0, body: vec![] };
/// use freezeframe_image::{Header, ImageWriter};
/// use std::os::unix::fs::FileExt;
///
/// let mut writer = ImageWriter::create(dir.path(), Header::new())?;
/// let pages = writer.new_pages()?;
/// pages.file.write_all_at(&[0xaa; 4096], 0).unwrap();
/// writer.record(record)?;
/// writer.finish_write()?; // all is written: a target dumped with -R may go on here
/// writer.commit(true)?; // durable, then valid
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ImageWriter {
    dir: PathBuf,
    header: Header,
    out: BufWriter<File>,
    digest: Xxh3Debug,
    records: u64,
    written: u64,
    pages: Vec<Made>,
    /// Lengths of the page files that are there already.
    kept: Vec<u64>,
    metadata: Made,
    /// Whether to try O_TMPFILE.
    unnamed: bool,
    finished: bool,
    committed: bool,
    /// Last, so that the directory stays locked until the cleanup is done.
    dirfd: DirFd,
}

/// A new page file.
#[derive(Debug)]
pub struct NewPages {
    /// The number by which extents and [`Image::open_pages`](crate::Image::open_pages) name it.
    pub number: u32,
    /// For writing, empty. All handles share one file position: write at offsets.
    pub file: File,
}

/// A file this run made.
#[derive(Debug)]
struct Made {
    file: File,
    /// The name it has now; `None` while it is an `O_TMPFILE`.
    name: Option<String>,
}

struct Xxh3Debug(Xxh3);

impl std::fmt::Debug for Xxh3Debug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0.digest())
    }
}

/// The directory, locked against a second dump into it where its filesystem
/// has locks.
#[derive(Debug)]
struct DirFd {
    dir: File,
    locked: bool,
}

impl DirFd {
    fn lock(fd: OwnedFd) -> Result<DirFd> {
        let dir = File::from(fd);
        match dir.try_lock() {
            Ok(()) => Ok(DirFd { dir, locked: true }),
            Err(TryLockError::WouldBlock) => Err(Error::new(
                Kind::ResourceInUse,
                "another dump is being written into this directory",
            )),
            Err(TryLockError::Error(_)) => Ok(DirFd { dir, locked: false }),
        }
    }

    fn fd(&self) -> &File {
        &self.dir
    }
}

impl Drop for DirFd {
    fn drop(&mut self) {
        if self.locked {
            // Its end unlocks it too, unless a process of ours still has it.
            let _ = self.dir.unlock();
        }
    }
}

impl ImageWriter {
    /// Begins an image in `dir`, which must exist. The files are readable by
    /// their owner only: they hold memory.
    ///
    /// What killed runs left in the directory is removed.
    ///
    /// # Errors
    /// `ResourceInUse` while another dump writes into the directory; else what
    /// the filesystem says, naming the path.
    pub fn create(dir: impl AsRef<Path>, header: Header) -> Result<ImageWriter> {
        ImageWriter::create_in(dir.as_ref(), header, true).in_phase(Phase::Plan)
    }

    fn create_in(dir: &Path, header: Header, unnamed: bool) -> Result<ImageWriter> {
        let dirfd = DirFd::lock(read::open_dir(dir)?).on(dir.display())?;
        if dirfd.locked {
            remove_leftovers(&dirfd, dir);
        }
        let temporary = temporary_name(header.image_id);
        let metadata = make(&dirfd, &temporary, unnamed).on(dir.join(METADATA).display())?;
        let clone = metadata.file.try_clone().sys("dup");
        let mut writer = ImageWriter {
            dir: dir.to_owned(),
            out: BufWriter::with_capacity(1 << 16, clone?),
            digest: Xxh3Debug(Xxh3::new()),
            records: 0,
            written: HEADER_LEN as u64,
            pages: Vec::new(),
            kept: Vec::new(),
            metadata,
            unnamed,
            finished: false,
            committed: false,
            dirfd,
            header,
        };
        let bytes = writer.header.to_bytes();
        writer.digest.0.update(&bytes);
        writer.put(&bytes)?;
        Ok(writer)
    }

    /// The header of this image.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The id of this image.
    pub fn id(&self) -> ImageId {
        self.header.image_id
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Adds a page file.
    ///
    /// # Errors
    /// What the filesystem says, naming the path.
    pub fn new_pages(&mut self) -> Result<NewPages> {
        self.unfinished()?;
        if self.pages.len() == MAX_PAGE_FILES {
            return Err(Error::bug(format!(
                "an image has at most {MAX_PAGE_FILES} page files"
            )));
        }
        let number = self.pages.len() as u32;
        let name = pages_name(self.header.image_id, number);
        let made = make(&self.dirfd, &name, self.unnamed)
            .in_phase(Phase::Pages)
            .on(self.dir.join(&name).display())?;
        let clone = made.file.try_clone();
        self.pages.push(made);
        let file = clone.sys("dup").on(self.dir.join(&name).display())?;
        Ok(NewPages { number, file })
    }

    /// The path that page file `number` will have, for messages.
    pub fn pages_path(&self, number: u32) -> PathBuf {
        self.dir.join(pages_name(self.header.image_id, number))
    }

    /// Adds a record.
    ///
    /// # Errors
    /// What the filesystem says, naming the path; `Bug` beyond the limits or
    /// after [`finish_write`](ImageWriter::finish_write).
    pub fn record(&mut self, record: RawRecord) -> Result<()> {
        if record.tag.reserved() {
            return Err(Error::bug(format!("the tag {} is reserved", record.tag)));
        }
        self.append(&record)
    }

    /// Encodes and adds a kind's record.
    ///
    /// # Errors
    /// As [`record`](ImageWriter::record), and `Bug` when it has no encoding.
    pub fn put_record<R: Record>(&mut self, subject: u64, value: &R) -> Result<()> {
        self.record(RawRecord::of(subject, value)?)
    }

    /// Writes all that is still to be written, so that only durability and
    /// the name are missing: no error of space comes after this on a local
    /// filesystem.
    ///
    /// # Errors
    /// What the filesystem says, naming the path.
    pub fn finish_write(&mut self) -> Result<()> {
        if self.finished {
            return Ok(());
        }
        let mut lengths: Vec<u8> = self.kept.iter().flat_map(|n| n.to_le_bytes()).collect();
        for (n, made) in self.pages.iter().enumerate() {
            let path = self.pages_path(n as u32);
            let length = made.file.metadata().sys("fstat").on(path.display())?.len();
            lengths.extend_from_slice(&length.to_le_bytes());
        }
        self.append(&own(Tag::PAGE_FILES, lengths))?;
        let mut end = self.records.to_le_bytes().to_vec();
        end.extend_from_slice(&self.digest.0.digest().to_le_bytes());
        self.append(&own(Tag::END, end))?;
        let flushed = self.out.flush().sys("write");
        flushed
            .in_phase(Phase::Commit)
            .on(self.dir.join(METADATA).display())?;
        self.finished = true;
        Ok(())
    }

    /// Makes the image valid: page files and metadata are flushed to the disk
    /// (unless not `sync`), named, and `freezeframe.img` replaced by a rename.
    /// Then the page files of the image that was there before, and what killed
    /// runs left, are removed.
    ///
    /// # Errors
    /// What the filesystem says, naming the path. The image that was there
    /// before is then still there, except when the directory alone could not be
    /// flushed: then the new one is, and might not survive a crash.
    pub fn commit(mut self, sync: bool) -> Result<()> {
        self.finish_write()?;
        self.commit_finished(sync).in_phase(Phase::Commit)
    }

    fn commit_finished(&mut self, sync: bool) -> Result<()> {
        let target = self.dir.join(METADATA);
        for n in 0..self.pages.len() {
            let name = pages_name(self.header.image_id, n as u32);
            let path = self.dir.join(&name);
            if sync {
                let synced = self.pages[n].file.sync_all().sys("fsync");
                synced.on(path.display())?;
            }
            give_name(&self.dirfd, &mut self.pages[n], name).on(path.display())?;
        }
        let temporary = temporary_name(self.header.image_id);
        give_name(&self.dirfd, &mut self.metadata, temporary.clone()).on(target.display())?;
        let dirfd = self.dirfd.fd();
        if sync {
            let synced = self.metadata.file.sync_all().sys("fsync");
            synced.on(target.display())?;
            // No filesystem has to keep the names above and the rename below in
            // their order. With a journal this costs nothing: the names went
            // with the file.
            let synced = nix::unistd::fsync(dirfd).sys("fsync");
            synced.on(self.dir.display())?;
        }
        // The commit point.
        renameat(dirfd, temporary.as_str(), dirfd, METADATA)
            .sys("rename")
            .on(target.display())?;
        self.committed = true;
        if sync {
            nix::unistd::fsync(dirfd)
                .sys("fsync")
                .on(self.dir.display())
                .context("the image is in place, but might not survive a crash")?;
        }
        remove_others(&self.dirfd, self.header.image_id);
        Ok(())
    }

    fn append(&mut self, record: &RawRecord) -> Result<()> {
        self.unfinished()?;
        let length = record.body.len() as u64;
        let total = self.written + RECORD_HEAD_LEN as u64 + length;
        if length > MAX_BODY || total > MAX_TOTAL || self.records >= MAX_RECORDS {
            return Err(Error::bug(format!(
                "the image is beyond its limits: {} records, {total} bytes, {length} in this one",
                self.records
            ))
            .on(record));
        }
        let head = record.head().to_bytes();
        self.digest.0.update(&head);
        self.put(&head)?;
        self.put(&record.body)?;
        self.written = total;
        self.records += 1;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let put = self.out.write_all(bytes).sys("write");
        put.on(self.dir.join(METADATA).display())
    }

    fn unfinished(&self) -> Result<()> {
        if self.finished {
            return Err(Error::bug("the image is already finished"));
        }
        Ok(())
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        for made in self.pages.iter().chain([&self.metadata]) {
            if let Some(name) = &made.name {
                // Nobody is left to tell; the next run tries again.
                let _ = unlinkat(self.dirfd.fd(), name.as_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
    }
}

/// Replaces records of an image that has been committed: those of the same tag and
/// subject. Its page files stay. As with [`commit`](ImageWriter::commit), there is
/// the old image or the new one, whatever happens.
///
/// # Errors
/// As [`Image::open`](crate::Image::open) and [`ImageWriter::create`];
/// `ResourceInUse` if `dir` holds another image by now; `Bug` if a record is not there.
pub fn amend(
    dir: impl AsRef<Path>,
    id: ImageId,
    records: Vec<RawRecord>,
    sync: bool,
) -> Result<()> {
    let image = read::Image::open(&dir)?;
    if image.header().image_id != id {
        let what = "another image is in its place";
        return Err(Error::new(Kind::ResourceInUse, what).on(dir.as_ref().display()));
    }
    let mut new: HashMap<(Tag, u64), RawRecord> = HashMap::new();
    new.extend(records.into_iter().map(|r| ((r.tag, r.subject), r)));
    let mut writer = ImageWriter::create(&dir, image.header().clone())?;
    let lengths = (0..image.page_files()).filter_map(|n| image.pages_len(n));
    writer.kept = lengths.collect();
    for old in image.records() {
        match new.remove(&(old.tag, old.subject)) {
            Some(record) => writer.record(record)?,
            None => writer.append(old)?,
        }
    }
    match new.into_values().next() {
        None => writer.commit(sync),
        Some(left) => Err(Error::bug("a record to be replaced is not there").on(left)),
    }
}

const OWNER_ONLY: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

fn own(tag: Tag, body: Vec<u8>) -> RawRecord {
    RawRecord {
        tag,
        version: 1,
        flags: CRITICAL,
        subject: 0,
        body,
    }
}

/// A new file: without a name, if so wanted and where the filesystem can do
/// that and a name can be given later; else under `name`.
fn make(dirfd: &DirFd, name: &str, unnamed: bool) -> Result<Made> {
    if unnamed && let Some(file) = make_unnamed(dirfd)? {
        return Ok(Made { file, name: None });
    }
    let flags =
        OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let fd = openat(dirfd.fd(), name, flags, OWNER_ONLY).sys("openat")?;
    Ok(Made {
        file: File::from(fd),
        name: Some(name.to_owned()),
    })
}

fn make_unnamed(dirfd: &DirFd) -> Result<Option<File>> {
    use Errno::{EINVAL, EISDIR, ENOENT, ENOSYS, EOPNOTSUPP};
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    match openat(dirfd.fd(), ".", flags, OWNER_ONLY) {
        // Without /proc it could get no name later.
        Ok(fd) => Ok(Path::new(&proc_path(&fd)).exists().then(|| File::from(fd))),
        // Not this filesystem or kernel.
        Err(EOPNOTSUPP | EISDIR | EINVAL | ENOENT | ENOSYS) => Ok(None),
        Err(errno) => Err(errno).sys("openat"),
    }
}

fn give_name(dirfd: &DirFd, made: &mut Made, name: String) -> Result<()> {
    if made.name.is_some() {
        return Ok(());
    }
    let from = proc_path(&made.file);
    linkat(
        AT_FDCWD,
        from.as_str(),
        dirfd.fd(),
        name.as_str(),
        AtFlags::AT_SYMLINK_FOLLOW,
    )
    .sys("linkat")?;
    made.name = Some(name);
    Ok(())
}

fn proc_path(fd: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Removes what no valid image refers to. Only under the lock: a page file
/// without an image may be another run's, about to be committed.
fn remove_leftovers(dirfd: &DirFd, dir: &Path) {
    match Header::read(dir) {
        Ok(header) => remove_others(dirfd, header.image_id),
        Err(e) if e.kind() == Kind::ImageIncomplete => remove_others(dirfd, ImageId::default()),
        // Damaged: the pages may still be worth something to somebody.
        Err(_) => {}
    }
}

/// Removes the files of all images but `keep`. What cannot be removed is the
/// next run's to try: the image is valid all the same.
fn remove_others(dirfd: &DirFd, keep: ImageId) {
    for name in read::list(dirfd.fd()).unwrap_or_default() {
        let stale = match classify(&name) {
            Some(Entry::Pages(id)) => id != keep,
            Some(Entry::Temporary(_)) => true,
            None => false,
        };
        if stale {
            let _ = unlinkat(dirfd.fd(), name.as_slice(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Image;

    fn names(dir: &Path) -> Vec<Vec<u8>> {
        let fd = read::open_dir(dir).unwrap();
        let mut names = read::list(&fd).unwrap();
        names.retain(|n| !n.starts_with(b".") || n.starts_with(b".freezeframe"));
        names.sort();
        names
    }

    /// A filesystem without O_TMPFILE: named from the start, and gone again.
    #[test]
    fn without_unnamed_files() {
        let dir = tempfile::tempdir().unwrap();
        let header = Header::new();
        let id = header.image_id;
        let mut w = ImageWriter::create_in(dir.path(), header.clone(), false).unwrap();
        w.new_pages().unwrap();
        let made = [temporary_name(id), pages_name(id, 0)].map(String::into_bytes);
        assert_eq!(names(dir.path()), made);
        drop(w);
        assert!(names(dir.path()).is_empty());

        let mut w = ImageWriter::create_in(dir.path(), header.clone(), false).unwrap();
        w.new_pages().unwrap();
        w.commit(true).unwrap();
        let made = [METADATA.to_owned(), pages_name(id, 0)].map(String::into_bytes);
        assert_eq!(names(dir.path()), made);
        assert_eq!(Image::open(dir.path()).unwrap().header(), &header);
    }

    #[test]
    fn a_record_is_replaced_and_all_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let record = |subject, body: &[u8]| RawRecord {
            tag: Tag::new(*b"TEST"),
            version: 1,
            flags: 0,
            subject,
            body: body.to_vec(),
        };
        let header = Header::new();
        let mut w = ImageWriter::create(dir.path(), header.clone()).unwrap();
        let mut pages = w.new_pages().unwrap();
        pages.file.write_all(&[7; 4096]).unwrap();
        for subject in 0..3 {
            w.record(record(subject, b"old")).unwrap();
        }
        w.commit(false).unwrap();
        let before = names(dir.path());
        let id = header.image_id;
        amend(dir.path(), id, vec![record(1, b"new")], false).unwrap();
        let image = Image::open(dir.path()).unwrap();
        assert_eq!((image.header(), names(dir.path())), (&header, before));
        assert_eq!(image.pages_len(0), Some(4096));
        let bodies: Vec<&[u8]> = image.records().iter().map(|r| &r.body[..]).collect();
        assert_eq!(bodies, [b"old", b"new", b"old"]);

        let of_none = amend(dir.path(), id, vec![record(9, b"new")], false);
        assert_eq!(of_none.unwrap_err().kind(), Kind::Bug);
        let other = amend(dir.path(), ImageId::random(), Vec::new(), false);
        assert_eq!(other.unwrap_err().kind(), Kind::ResourceInUse);
        assert_eq!(Image::open(dir.path()).unwrap().records()[1].body, b"new");
    }
}
