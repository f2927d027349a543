//! The envelope as others meet it: a directory, whole or damaged.

#![allow(clippy::unwrap_used)]
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use freezeframe_error::Kind;
use freezeframe_image::*;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

#[derive(Serialize, Deserialize, Debug, PartialEq)]
struct Sample {
    name: String,
    values: Vec<u64>,
}

impl Record for Sample {
    const TAG: Tag = Tag::new(*b"SMPL");
    const VERSION: u16 = 2;
    const CRITICAL: bool = true;
    fn decode_old(version: u16, body: &[u8]) -> Option<Result<Sample>> {
        match version {
            1 => Some(decode::<SampleV1>(body).map(Sample::from)),
            _ => None,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct SampleV1 {
    name: String,
}

impl From<SampleV1> for Sample {
    fn from(old: SampleV1) -> Sample {
        Sample {
            name: old.name,
            values: Vec::new(),
        }
    }
}

fn sample(n: u64) -> Sample {
    Sample {
        name: format!("task {n}"),
        values: vec![n, 0x7fff_ffff_f000],
    }
}

fn optional() -> RawRecord {
    RawRecord {
        tag: Tag::new(*b"NOTE"),
        version: 1,
        flags: 0,
        subject: 0,
        body: b"hello".to_vec(),
    }
}

/// Everything is given, so that the bytes are always the same.
fn fixed_header() -> Header {
    Header {
        image_id: ImageId(*b"golden image 001"),
        created: 1_760_000_000_123_456_789,
        kernel_release: "6.18.44-test".into(),
        ..Header::new()
    }
}

fn write(dir: &Path, header: Header) {
    let mut w = ImageWriter::create(dir, header).unwrap();
    let pages = w.new_pages().unwrap();
    pages.file.write_all_at(&[0x5a; 4096], 0).unwrap();
    for n in [41, 42] {
        w.put_record(n, &sample(n)).unwrap();
    }
    w.record(optional()).unwrap();
    w.commit(false).unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn kind_of(dir: &Path) -> Kind {
    Image::open(dir).unwrap_err().kind()
}

#[test]
fn what_is_written_is_read() {
    let dir = TempDir::new().unwrap();
    let header = fixed_header();
    write(dir.path(), header.clone());
    assert_eq!(
        names(dir.path()),
        [METADATA.to_owned(), pages_name(header.image_id, 0)]
    );
    for name in names(dir.path()) {
        let mode = fs::metadata(dir.path().join(name)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
    }

    assert_eq!(Header::read(dir.path()).unwrap(), header);
    let image = Image::open(dir.path()).unwrap();
    assert_eq!(image.header(), &header);
    assert_eq!(image.records().len(), 3);
    assert_eq!(image.require::<Sample>(42).unwrap(), sample(42));
    assert_eq!(image.get::<Sample>(43).unwrap(), None);
    assert_eq!(
        image.require::<Sample>(43).unwrap_err().kind(),
        Kind::ImageCorrupt
    );
    assert_eq!(image.all(Sample::TAG).count(), 2);
    assert_eq!(image.find(optional().tag, 0), Some(&optional()));
    assert_eq!(image.page_files(), 1);
    assert_eq!(image.pages_len(0), Some(4096));
    let mut page = [0; 4096];
    let file = image.open_pages(0).unwrap();
    file.read_exact_at(&mut page, 0).unwrap();
    assert_eq!(page, [0x5a; 4096]);
    assert!(image.open_pages(1).is_err());
}

/// The format is frozen: what version 1 wrote stays readable, and this build
/// writes the same bytes. The golden image is remade by
/// `FREEZEFRAME_BLESS=1 cargo test -p freezeframe-image golden`, and only
/// before a format is released.
#[test]
fn golden_image_of_version_1() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    if std::env::var_os("FREEZEFRAME_BLESS").is_some() {
        fs::create_dir_all(&golden).unwrap();
        write(&golden, fixed_header());
    }
    let image = Image::open(&golden).unwrap();
    assert_eq!(image.header(), &fixed_header());
    assert_eq!(image.require::<Sample>(41).unwrap(), sample(41));
    assert_eq!(image.find(optional().tag, 0), Some(&optional()));

    let dir = TempDir::new().unwrap();
    write(dir.path(), fixed_header());
    assert_eq!(
        fs::read(dir.path().join(METADATA)).unwrap(),
        fs::read(golden.join(METADATA)).unwrap()
    );
}

#[test]
fn every_flipped_bit_is_found() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), fixed_header());
    let mut bytes = fs::read(dir.path().join(METADATA)).unwrap();
    Image::from_bytes(&bytes).unwrap();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            let found = Image::from_bytes(&bytes).map(|_| ()).map_err(|e| e.kind());
            assert_eq!(found, Err(Kind::ImageCorrupt), "byte {at} bit {bit}");
            bytes[at] ^= 1 << bit;
        }
    }
}

#[test]
fn every_truncation_and_addition_is_found() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), fixed_header());
    let path = dir.path().join(METADATA);
    let whole = fs::read(&path).unwrap();
    for n in 0..whole.len() {
        let e = Image::from_bytes(&whole[..n]).unwrap_err();
        assert_eq!(e.kind(), Kind::ImageIncomplete, "{n} bytes: {e:?}");
    }
    for n in [0, 1, 100, 128, 200, whole.len() - 1] {
        fs::write(&path, &whole[..n]).unwrap();
        assert_eq!(kind_of(dir.path()), Kind::ImageIncomplete, "{n} bytes");
    }
    fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
    assert_eq!(kind_of(dir.path()), Kind::ImageCorrupt);
}

/// Where each record begins, and the end.
fn boundaries(bytes: &[u8]) -> Vec<usize> {
    let mut all = vec![HEADER_LEN];
    while let Some(&at) = all.last()
        && at < bytes.len()
    {
        let length = u64::from_le_bytes(bytes[at + 16..at + 24].try_into().unwrap());
        all.push(at + RECORD_HEAD_LEN + length as usize);
    }
    all
}

#[test]
fn lost_doubled_and_swapped_records_are_found() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), fixed_header());
    let whole = fs::read(dir.path().join(METADATA)).unwrap();
    let at = boundaries(&whole);
    let part = |n: usize| &whole[at[n]..at[n + 1]];
    let header = &whole[..HEADER_LEN];
    assert_eq!(at.len(), 6); // two samples, a note, the page files, the end
    let check = |parts: &[usize]| {
        let mut bytes = header.to_vec();
        parts.iter().for_each(|&n| bytes.extend_from_slice(part(n)));
        Image::from_bytes(&bytes).map(|_| ()).map_err(|e| e.kind())
    };
    assert_eq!(check(&[0, 1, 2, 3, 4]), Ok(()));
    for wrong in [
        &[1, 2, 3, 4][..],
        &[0, 1, 2, 4],
        &[0, 0, 1, 2, 3, 4],
        &[1, 0, 2, 3, 4],
        &[0, 1, 2, 3, 3, 4],
        &[0, 1, 2, 3, 4, 4],
        &[4],
    ] {
        assert_eq!(check(wrong), Err(Kind::ImageCorrupt), "{wrong:?}");
    }
}

#[test]
fn a_length_is_checked_before_anything_is_allocated() {
    // A head whose checksum is right, but whose length is not.
    let dir = TempDir::new().unwrap();
    write(dir.path(), fixed_header());
    let whole = fs::read(dir.path().join(METADATA)).unwrap();
    for (length, kind) in [
        (u64::MAX, Kind::ImageCorrupt),
        (MAX_BODY + 1, Kind::ImageCorrupt),
        (MAX_BODY, Kind::ImageIncomplete),
    ] {
        let mut bytes = whole.clone();
        let head = &mut bytes[HEADER_LEN..HEADER_LEN + RECORD_HEAD_LEN];
        head[16..24].copy_from_slice(&length.to_le_bytes());
        let sum = xxhash_rust::xxh3::xxh3_64(&head[..32]);
        head[32..].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Image::from_bytes(&bytes).unwrap_err().kind(), kind);
    }
}

#[test]
fn each_thing_that_is_no_image_says_what_it_is() {
    let dir = TempDir::new().unwrap();
    let says = |path: &Path, kind: Kind, text: &str| {
        for e in [
            Image::open(path).unwrap_err(),
            Header::read(path).unwrap_err(),
        ] {
            assert_eq!(e.kind(), kind, "{e:?}");
            assert!(e.to_string().contains(text), "{e:?}");
            assert!(
                e.to_string().contains(dir.path().to_str().unwrap()),
                "{e:?}"
            );
        }
    };
    let missing = dir.path().join("missing");
    says(&missing, Kind::ImageIncomplete, "no such image directory");
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    says(&file, Kind::ImageIncomplete, "is a directory, this is not");
    says(
        dir.path(),
        Kind::ImageIncomplete,
        "freezeframe.img is missing",
    );

    let half = dir.path().join("half");
    fs::create_dir(&half).unwrap();
    fs::write(half.join(pages_name(ImageId([1; 16]), 0)), "x").unwrap();
    says(&half, Kind::ImageIncomplete, "did not finish");
    fs::write(half.join(METADATA), "").unwrap();
    says(&half, Kind::ImageIncomplete, "the file is empty");
    fs::write(half.join(METADATA), "\x7fELF and so on").unwrap();
    says(&half, Kind::ImageCorrupt, "not a freezeframe image");
    fs::remove_file(half.join(METADATA)).unwrap();
    nix::unistd::mkfifo(&half.join(METADATA), nix::sys::stat::Mode::S_IRWXU).unwrap();
    says(&half, Kind::ImageCorrupt, "not a regular file");

    let criu = dir.path().join("criu");
    fs::create_dir(&criu).unwrap();
    fs::write(criu.join("inventory.img"), "x").unwrap();
    says(&criu, Kind::ImageIncomplete, "image of CRIU");
}

#[test]
fn other_versions_are_told_from_damage() {
    for (header, text) in [
        (
            Header {
                format_version: 2,
                ..fixed_header()
            },
            "format version 2",
        ),
        (
            Header {
                arch: 183,
                ..fixed_header()
            },
            "ELF machine 183",
        ),
        (
            Header {
                page_size: 65536,
                ..fixed_header()
            },
            "65536",
        ),
    ] {
        let dir = TempDir::new().unwrap();
        write(dir.path(), header.clone());
        let e = Image::open(dir.path()).unwrap_err();
        assert_eq!(e.kind(), Kind::ImageVersion);
        assert!(e.to_string().contains(text), "{e}");
        assert_eq!(Header::read(dir.path()).unwrap(), header);
    }
}

#[test]
fn a_page_file_that_is_missing_or_of_another_length_is_found() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), fixed_header());
    let path = dir.path().join(pages_name(fixed_header().image_id, 0));
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(4095).unwrap();
    assert_eq!(kind_of(dir.path()), Kind::ImageIncomplete);
    file.set_len(4097).unwrap();
    assert_eq!(kind_of(dir.path()), Kind::ImageCorrupt);
    fs::remove_file(&path).unwrap();
    assert_eq!(kind_of(dir.path()), Kind::ImageIncomplete);
}

#[test]
fn record_versions_convert_or_are_refused() {
    let old = RawRecord {
        version: 1,
        body: encode(&SampleV1 { name: "old".into() }).unwrap(),
        ..RawRecord::of(1, &sample(1)).unwrap()
    };
    assert_eq!(old.decode_as::<Sample>().unwrap().name, "old");
    for version in [0, 3] {
        let e = RawRecord {
            version,
            ..old.clone()
        }
        .decode_as::<Sample>()
        .unwrap_err();
        assert_eq!(e.kind(), Kind::ImageVersion);
        assert!(e.to_string().contains("SMPL record of 1"), "{e}");
    }
    assert_eq!(
        optional().decode_as::<Sample>().unwrap_err().kind(),
        Kind::Bug
    );
    let damaged = RawRecord { version: 2, ..old };
    assert_eq!(
        damaged.decode_as::<Sample>().unwrap_err().kind(),
        Kind::ImageCorrupt
    );
}

#[test]
fn unknown_records_are_refused_or_reported() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), fixed_header());
    let image = Image::open(dir.path()).unwrap();
    let note = Unknown {
        tag: optional().tag,
        records: 1,
        critical: false,
    };
    assert_eq!(image.refuse_unknown(&[Sample::TAG]).unwrap(), [note]);
    assert_eq!(image.unknown(&[]).len(), 2);
    let e = image.refuse_unknown(&[optional().tag]).unwrap_err();
    assert_eq!(e.kind(), Kind::ImageVersion);
    assert!(e.to_string().contains("SMPL"), "{e}");
}

#[test]
fn a_commit_replaces_the_old_image_and_leftovers_go() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    fs::write(dir.path().join("pages-1.img"), "CRIU's").unwrap();
    write(dir.path(), Header::new());
    let old = Image::open(dir.path()).unwrap();
    // What a killed run leaves.
    let dead = ImageId([7; 16]);
    fs::write(dir.path().join(pages_name(dead, 0)), "x").unwrap();
    fs::write(dir.path().join(format!(".freezeframe-{dead}.tmp")), "x").unwrap();

    let header = Header::new();
    let mut w = ImageWriter::create(dir.path(), header.clone()).unwrap();
    // The leftovers are gone at once, the old image is whole.
    assert_eq!(names(dir.path()).len(), 4);
    Image::open(dir.path()).unwrap();
    w.new_pages().unwrap();
    w.record(optional()).unwrap();
    w.finish_write().unwrap();
    assert_eq!(w.record(optional()).unwrap_err().kind(), Kind::Bug);
    assert_eq!(
        Image::open(dir.path()).unwrap().header(),
        old.header(),
        "finish_write commits nothing"
    );
    w.commit(true).unwrap();
    let mut expected = vec![
        METADATA.to_owned(),
        "notes.txt".to_owned(),
        "pages-1.img".to_owned(),
        pages_name(header.image_id, 0),
    ];
    expected.sort();
    assert_eq!(names(dir.path()), expected);
    assert_eq!(Image::open(dir.path()).unwrap().header(), &header);
    // Who had the old one open still can read it.
    let mut page = [0; 4096];
    let file = old.open_pages(0).unwrap();
    file.read_exact_at(&mut page, 0).unwrap();
    assert_eq!(page, [0x5a; 4096]);
}

#[test]
fn dropped_without_commit_nothing_stays() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), Header::new());
    let before = names(dir.path());
    let mut w = ImageWriter::create(dir.path(), Header::new()).unwrap();
    w.new_pages().unwrap();
    w.finish_write().unwrap();
    drop(w);
    assert_eq!(names(dir.path()), before);
    Image::open(dir.path()).unwrap();
}

#[test]
fn two_dumps_into_one_directory_are_refused() {
    let dir = TempDir::new().unwrap();
    let first = ImageWriter::create(dir.path(), Header::new()).unwrap();
    let e = ImageWriter::create(dir.path(), Header::new()).unwrap_err();
    assert_eq!(e.kind(), Kind::ResourceInUse);
    drop(first);
    ImageWriter::create(dir.path(), Header::new()).unwrap();
}

/// Runs `f` in a thread with a small tmpfs of its own, which nobody else sees.
fn in_small_tmpfs(size: &'static str, f: impl FnOnce(&Path) + Send + 'static) {
    use nix::mount::{MsFlags, mount};
    std::thread::spawn(move || {
        let dir = TempDir::new().unwrap();
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let data = format!("size={size}");
        mount(
            Some("small"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some(data.as_str()),
        )
        .unwrap();
        f(dir.path());
        nix::mount::umount(dir.path()).unwrap();
    })
    .join()
    .unwrap();
}

#[test]
fn no_space_is_said_and_nothing_stays() {
    in_small_tmpfs("256k", |dir| {
        write(dir, fixed_header());
        let before = names(dir);
        let mut w = ImageWriter::create(dir, Header::new()).unwrap();
        let big = RawRecord {
            body: vec![1; 1 << 20],
            ..optional()
        };
        let e = w.record(big).unwrap_err();
        assert_eq!(e.kind(), Kind::NoSpace);
        assert!(e.to_string().contains(dir.to_str().unwrap()), "{e}");
        drop(w);
        assert_eq!(names(dir), before);
        Image::open(dir).unwrap();
    });
}
