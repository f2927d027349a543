//! Every way of storing pages gives the same memory back, and damage to it is found.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_image::{Image, pages_name};
use freezeframe_pages::PageReader;
use freezeframe_tests::run::{DEADLINE, Mode, Scene};
use freezeframe_tests::tool::freezeframe;
use std::fs::File;
use std::os::unix::fs::FileExt;

type Done = Result<(), String>;

/// Programs whose pages are of every kind: sparse, zero, shared since forks, of objects, written over files.
const PROGRAMS: [&str; 8] = [
    "memory::holes",
    "memory::zeroed",
    "memory::shared",
    "memory::guard_regions",
    "memory::huge_pages",
    "mappings::cow_family",
    "mappings::cow_generations",
    "scale::everything",
];

/// Dumps and restores with these options, then lets the program run on through a dump.
fn carried(options: &[&str]) -> Done {
    for name in PROGRAMS {
        let told = |e: String| format!("{name}: {e}");
        let scene = Scene::new()?;
        let (program, target, before) = scene.start_sized(name, 1).map_err(told)?;
        let dumped = scene
            .dump(&program, &target, "img", options)
            .map_err(told)?;
        dumped.must_exit(0).map_err(told)?;
        scene.await_gone(&before, DEADLINE).map_err(told)?;
        scene.verify("img").map_err(told)?;
        let target = scene.restore(&program, &target, "img").map_err(told)?;
        let running = [options, &["--leave-running"]].concat();
        let dumped = scene
            .dump(&program, &target, "again", &running)
            .map_err(told)?;
        dumped.must_exit(0).map_err(told)?;
        scene.verify("again").map_err(told)?;
        scene
            .finish(target, &program, &before, Mode::Restore)
            .map_err(told)?;
    }
    Ok(())
}

#[test]
fn compressed_by_lz4() -> Done {
    carried(&["--compress", "lz4"])
}

#[test]
fn compressed_by_zstd() -> Done {
    carried(&["--compress=zstd"])
}

#[test]
fn compressed_by_zstd_at_a_level_past_the_cache() -> Done {
    carried(&["--compress=zstd:-3", "--direct"])
}

#[test]
fn equal_pages_once() -> Done {
    carried(&["--dedup-pages"])
}

#[test]
fn equal_pages_once_and_compressed() -> Done {
    carried(&["--dedup-pages", "--compress=lz4"])
}

#[test]
fn past_the_cache() -> Done {
    carried(&["--direct"])
}

#[test]
fn damage_in_compressed_pages_is_found() -> Done {
    for how in ["lz4", "zstd"] {
        let scene = Scene::new()?;
        let (_, target, before) = scene.start_sized("scale::everything", 1)?;
        let dumped = scene.dump_pid(target.pid, "img", &["--compress", how])?;
        dumped.must_exit(0)?;
        scene.await_gone(&before, DEADLINE)?;
        let image = Image::open(scene.path("img")).unwrap();
        let reader = PageReader::open(&image).unwrap();
        let block = reader.blocks().iter().find(|b| !b.is_raw()).unwrap();
        let name = pages_name(image.header().image_id, block.file);
        let path = scene.path("img").join(name);
        let file = File::options().read(true).write(true).open(path).unwrap();
        let at = block.offset + block.stored / 2;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let dir = scene.path("img").to_string_lossy().into_owned();
        for action in ["verify", "restore"] {
            let outcome = freezeframe(&[action, "-D", &dir], DEADLINE)?.must_exit(1)?;
            let said = outcome.told();
            if !said.contains("pages") {
                return Err(format!("{action} of damaged {how}: {said}"));
            }
        }
        // Nothing is left of the restore.
        scene.await_gone(&before, DEADLINE)?;
        // Whole again, it is restored, and its end is ours to see.
        file.write_all_at(&byte, at).unwrap();
        let (target, _) = scene.restore_pid(target.pid, "img", &[])?;
        let program = freezeframe_tests::programs::all()
            .find(|p| p.full_name() == "scale::everything")
            .unwrap();
        scene.finish(target, &program, &before, Mode::Restore)?;
    }
    Ok(())
}

#[test]
fn words_that_are_no_way_to_compress() -> Done {
    for word in ["gzip", "zstd:99", "lz4:1", ""] {
        let outcome = freezeframe(&["dump", "-t", "1", "--compress", word], DEADLINE)?;
        let outcome = outcome.must_exit(2)?;
        if !outcome.told().contains("--compress") {
            return Err(outcome.told());
        }
    }
    Ok(())
}
