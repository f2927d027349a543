//! Reading an image.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt, SysExt};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::header::u64_at;
use crate::names::{METADATA, classify, pages_name};
use crate::record::Head;
use crate::{
    HEADER_LEN, Header, MAX_PAGE_FILES, MAX_RECORDS, MAX_TOTAL, RECORD_HEAD_LEN, RawRecord, Record,
    Tag,
};

/// An image whose envelope has been checked, whole: every checksum and length
/// of `freezeframe.img`, and that each page file is there with its length. What
/// the records say has not been decoded; the pages' own checksums are for
/// `freezeframe-pages`.
#[derive(Debug)]
pub struct Image {
    header: Header,
    records: Vec<RawRecord>,
    first: HashMap<(Tag, u64), usize>,
    pages: Vec<PageFile>,
    dir: Option<PathBuf>,
}

#[derive(Debug)]
struct PageFile {
    length: u64,
    /// Kept open from the start, so that a later dump into the same directory
    /// takes nothing away from us. `None` in an image from bytes.
    file: Option<File>,
}

/// Records of one tag that the caller does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// The tag.
    pub tag: Tag,
    /// How many records have it.
    pub records: usize,
    /// Whether one of them is critical: then the image must be refused.
    pub critical: bool,
}

impl Image {
    /// Opens and checks the image in `dir`.
    ///
    /// # Errors
    /// `ImageIncomplete` (no directory, no `freezeframe.img`, one that is
    /// empty or ends too early, a page file missing or too short),
    /// `ImageCorrupt` (a checksum or length is wrong), `ImageVersion` (another
    /// format, architecture or page size).
    pub fn open(dir: impl AsRef<Path>) -> Result<Image> {
        Image::open_in(dir.as_ref()).in_phase(Phase::Load)
    }

    fn open_in(dir: &Path) -> Result<Image> {
        let dirfd = open_dir(dir)?;
        let (file, length) = open_metadata(&dirfd, dir)?;
        let mut image = Image::parse(BufReader::with_capacity(1 << 16, file), length)
            .on(dir.join(METADATA).display())?;
        for (n, page_file) in image.pages.iter_mut().enumerate() {
            let name = pages_name(image.header.image_id, n as u32);
            page_file.file = Some(
                open_page_file(&dirfd, &name, page_file.length).on(dir.join(&name).display())?,
            );
        }
        image.dir = Some(dir.to_owned());
        Ok(image)
    }

    /// Checks the bytes of a `freezeframe.img` without a directory around it:
    /// the same, but that page files are not looked for.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Image> {
        Image::parse(bytes, bytes.len() as u64).in_phase(Phase::Load)
    }

    /// `length` is that of the whole file: no length within is believed beyond it.
    fn parse(mut from: impl Read, length: u64) -> Result<Image> {
        if length > MAX_TOTAL {
            return Err(Error::corrupt(format!(
                "the file has {length} bytes, more than the limit of {MAX_TOTAL}"
            )));
        }
        let mut bytes = vec![0; length.min(HEADER_LEN as u64) as usize];
        from.read_exact(&mut bytes).sys("read")?;
        let header = Header::parse(&bytes)?;
        header.check()?;
        if header.to_bytes() != bytes[..] {
            return Err(Error::corrupt("the header's reserved bytes are not zero"));
        }

        let mut at = HEADER_LEN as u64;
        let mut digest = Xxh3::new();
        digest.update(&bytes);
        let mut records: Vec<RawRecord> = Vec::new();
        let mut pages: Option<Vec<PageFile>> = None;
        loop {
            let number = records.len() as u64 + u64::from(pages.is_some());
            if length - at < RECORD_HEAD_LEN as u64 {
                return Err(cut(at, length, "before its last record"));
            }
            let mut head = [0; RECORD_HEAD_LEN];
            from.read_exact(&mut head).sys("read")?;
            let head_bytes = head;
            let head = Head::parse(&head).context(format!("record {number} at byte {at}"))?;
            at += RECORD_HEAD_LEN as u64;
            if length - at < head.length {
                return Err(cut(at, length, "in the middle of a record"));
            }
            let mut body = Vec::new();
            body.try_reserve_exact(head.length as usize)
                .map_err(|e| Error::new(Kind::NoSpace, "no memory for a record").caused_by(e))?;
            body.resize(head.length as usize, 0);
            from.read_exact(&mut body).sys("read")?;
            let record = RawRecord {
                tag: head.tag,
                version: head.version,
                flags: head.flags,
                subject: head.subject,
                body,
            };
            if xxh3_64(&record.body) != head.body_checksum {
                return Err(Error::corrupt(format!(
                    "the checksum of the {record} at byte {at} is wrong"
                )));
            }
            at += head.length;

            if record.tag == Tag::END {
                let sound = record.body.len() == 16
                    && u64_at(&record.body, 0) == number
                    && u64_at(&record.body, 8) == digest.digest();
                if !sound {
                    return Err(Error::corrupt(
                        "records are missing, or others than were written",
                    ));
                }
                if at != length {
                    return Err(Error::corrupt(format!(
                        "{} bytes follow the last record",
                        length - at
                    )));
                }
                break;
            }
            digest.update(&head_bytes);
            if record.tag == Tag::PAGE_FILES {
                let whole =
                    record.body.len().is_multiple_of(8) && record.body.len() / 8 <= MAX_PAGE_FILES;
                if !whole || pages.is_some() {
                    return Err(Error::corrupt("the list of page files is malformed"));
                }
                let one = |chunk: &[u8]| PageFile {
                    length: u64_at(chunk, 0),
                    file: None,
                };
                pages = Some(record.body.chunks_exact(8).map(one).collect());
                continue;
            }
            if records.len() as u64 == MAX_RECORDS {
                return Err(Error::corrupt(format!(
                    "there are more than {MAX_RECORDS} records"
                )));
            }
            records.push(record);
        }
        let pages = pages.ok_or_else(|| Error::corrupt("the list of page files is missing"))?;

        let mut first = HashMap::with_capacity(records.len());
        for (i, r) in records.iter().enumerate() {
            first.entry((r.tag, r.subject)).or_insert(i);
        }
        Ok(Image {
            header,
            records,
            first,
            pages,
            dir: None,
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The directory it was opened in; `None` for an image from bytes.
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// All records, in the order they were written.
    pub fn records(&self) -> &[RawRecord] {
        &self.records
    }

    /// The first record of this tag and subject.
    pub fn find(&self, tag: Tag, subject: u64) -> Option<&RawRecord> {
        self.first.get(&(tag, subject)).map(|&i| &self.records[i])
    }

    /// The records of this tag, in the order they were written.
    pub fn all(&self, tag: Tag) -> impl Iterator<Item = &RawRecord> {
        self.records.iter().filter(move |r| r.tag == tag)
    }

    /// Decodes the first record of this kind and subject, if there is one.
    ///
    /// # Errors
    /// As [`RawRecord::decode_as`].
    pub fn get<R: Record>(&self, subject: u64) -> Result<Option<R>> {
        self.find(R::TAG, subject)
            .map(RawRecord::decode_as)
            .transpose()
    }

    /// Decodes the first record of this kind and subject, which must be there.
    ///
    /// # Errors
    /// `ImageCorrupt` without one; else as [`RawRecord::decode_as`].
    pub fn require<R: Record>(&self, subject: u64) -> Result<R> {
        self.get(subject)?.ok_or_else(|| {
            let of = match subject {
                0 => String::new(),
                subject => format!(" of {subject}"),
            };
            Error::corrupt(format!("the image has no {} record{of}", R::TAG))
        })
    }

    /// The tags of this image that are not among `known`.
    pub fn unknown(&self, known: &[Tag]) -> Vec<Unknown> {
        let mut found: Vec<Unknown> = Vec::new();
        for r in &self.records {
            if known.contains(&r.tag) {
                continue;
            }
            match found.iter_mut().find(|u| u.tag == r.tag) {
                Some(u) => {
                    u.records += 1;
                    u.critical |= r.is_critical();
                }
                None => found.push(Unknown {
                    tag: r.tag,
                    records: 1,
                    critical: r.is_critical(),
                }),
            }
        }
        found
    }

    /// Refuses an image with critical records whose tag is not among `known`,
    /// by name; else returns the optional ones, to be reported and skipped.
    ///
    /// # Errors
    /// `ImageVersion`.
    pub fn refuse_unknown(&self, known: &[Tag]) -> Result<Vec<Unknown>> {
        let unknown = self.unknown(known);
        let critical: Vec<String> = unknown
            .iter()
            .filter(|u| u.critical)
            .map(|u| u.tag.to_string())
            .collect();
        if critical.is_empty() {
            return Ok(unknown);
        }
        Err(Error::new(
            Kind::ImageVersion,
            format!(
                "the image has records that this build does not know and may not skip: {}",
                critical.join(", ")
            ),
        ))
    }

    /// How many page files it has.
    pub fn page_files(&self) -> u32 {
        self.pages.len() as u32
    }

    /// The length in bytes that page file `number` has.
    pub fn pages_len(&self, number: u32) -> Option<u64> {
        self.pages.get(number as usize).map(|p| p.length)
    }

    /// The path of page file `number`, for messages.
    pub fn pages_path(&self, number: u32) -> PathBuf {
        let name = pages_name(self.header.image_id, number);
        self.dir.as_deref().unwrap_or(Path::new("")).join(name)
    }

    /// Page file `number`, for reading. All handles share one file position:
    /// read at offsets.
    ///
    /// # Errors
    /// `ImageCorrupt` when there is none of that number.
    pub fn open_pages(&self, number: u32) -> Result<File> {
        let file = self.pages.get(number as usize).map(|p| &p.file);
        match file {
            Some(Some(file)) => file
                .try_clone()
                .sys("dup")
                .on(self.pages_path(number).display()),
            _ => Err(
                Error::corrupt(format!("the image has no page file {number}"))
                    .in_phase(Phase::Load),
            ),
        }
    }
}

fn cut(at: u64, length: u64, place: &str) -> Error {
    Error::new(
        Kind::ImageIncomplete,
        format!("the file ends {place}, after {length} bytes (the record is at byte {at})"),
    )
}

/// Opens the directory for `*at` calls.
pub(crate) fn open_dir(dir: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(dir, flags, Mode::empty()).map_err(|errno| {
        let e = Error::syscall("open", errno as i32);
        let e = match errno {
            Errno::ENOENT => e
                .with_kind(Kind::ImageIncomplete)
                .context("there is no such image directory"),
            Errno::ENOTDIR => e
                .with_kind(Kind::ImageIncomplete)
                .context("an image is a directory, this is not"),
            _ => e,
        };
        e.on(dir.display())
    })
}

/// Opens `freezeframe.img`, with its length.
pub(crate) fn open_metadata(dirfd: &OwnedFd, dir: &Path) -> Result<(File, u64)> {
    let path = dir.join(METADATA);
    // Not blocking: what is there might be a FIFO.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let fd = match openat(dirfd, METADATA, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::ENOENT) => return Err(nothing_here(dirfd).on(dir.display())),
        Err(errno) => return Err(errno).sys("openat").on(path.display()),
    };
    let file = File::from(fd);
    let meta = file.metadata().sys("fstat").on(path.display())?;
    if !meta.is_file() {
        return Err(Error::corrupt("this is not a regular file").on(path.display()));
    }
    Ok((file, meta.len()))
}

/// Why there is no `freezeframe.img`.
fn nothing_here(dirfd: &OwnedFd) -> Error {
    let mut why = "there is no image here: freezeframe.img is missing";
    for name in list(dirfd).unwrap_or_default() {
        if classify(&name).is_some() {
            why = "the dump into this directory did not finish: freezeframe.img is missing";
        } else if name == b"inventory.img" {
            why = "this is an image of CRIU: there is no freezeframe.img";
        }
    }
    Error::new(Kind::ImageIncomplete, why)
}

/// The names in a directory.
pub(crate) fn list(dirfd: impl AsFd) -> Result<Vec<Vec<u8>>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut dir = Dir::openat(dirfd, ".", flags, Mode::empty()).sys("openat")?;
    dir.iter()
        .map(|entry| Ok(entry.sys("getdents")?.file_name().to_bytes().to_owned()))
        .collect()
}

fn open_page_file(dirfd: &OwnedFd, name: &str, length: u64) -> Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = match openat(dirfd, name, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::ENOENT) => {
            return Err(Error::new(
                Kind::ImageIncomplete,
                "a page file of the image is missing",
            ));
        }
        Err(errno) => return Err(errno).sys("openat"),
    };
    let found = file.metadata().sys("fstat")?;
    if !found.is_file() {
        return Err(Error::corrupt("this is not a regular file"));
    }
    if found.len() < length {
        return Err(Error::new(
            Kind::ImageIncomplete,
            format!(
                "the page file has {} bytes instead of {length}",
                found.len()
            ),
        ));
    }
    if found.len() > length {
        return Err(Error::corrupt(format!(
            "the page file has {} bytes instead of {length}",
            found.len()
        )));
    }
    Ok(file)
}
