//! A whole `freezeframe.img`, its checksums made right: what a restore and `inspect` make of it before anything is
//! created. Mutations are of single records, so that the rest still holds together.
#![no_main]

use std::collections::HashSet;

use freezeframe_engine::restore::load::Loaded;
use freezeframe_engine::restore::plan;
use freezeframe_image::Image;
use freezeframe_kinds::registry;
use freezeframe_pages::{PageReader, What};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    match freezeframe_fuzz::mutated(&data[..size], max_size, seed, fuzzer_mutate) {
        Some(bytes) => {
            data[..bytes.len()].copy_from_slice(&bytes);
            bytes.len()
        }
        None => fuzzer_mutate(data, size, max_size),
    }
});

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    freezeframe_fuzz::repair(&mut bytes);
    let Ok(image) = Image::from_bytes(&bytes) else {
        return;
    };
    for record in image.records() {
        if let Some(about) = registry::about(record.tag) {
            let _ = (about.show)(record);
        }
    }
    let reader = PageReader::open(&image);
    let (Ok(loaded), Ok(reader)) = (Loaded::of(image), reader) else {
        return;
    };
    let mut cow = HashSet::new();
    for process in loaded.procs.iter().filter(|p| p.is_alive()) {
        let same = |what: &What| matches!(what, What::Same { .. });
        if reader.extents(process.mm).iter().any(|e| same(&e.what)) {
            cow.insert(process.pid());
        }
        for vma in &loaded.spaces[&process.mm].vmas {
            let _ = reader.stats(process.mm, vma.start..vma.end);
            let _ = reader.uses(process.mm, vma.start..vma.end);
            let _ = reader.zeros(process.mm, vma.start..vma.end);
        }
    }
    let _ = plan::plan(&loaded.procs, &cow);
    let _ = loaded.hole(1 << 30);
});
