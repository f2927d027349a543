//! Any bytes as the body of any kind's record, of any version, or of one of the engine's own.
#![no_main]

use freezeframe_image::decode;
use freezeframe_kinds::{model, registry};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let &[which, older, ref body @ ..] = data else {
        return;
    };
    let kinds = registry::all().count();
    match registry::all().nth(usize::from(which)) {
        Some((_, about)) => registry::fuzz_decode(about.tag, u16::from(older % 4), body),
        None => match usize::from(which) - kinds {
            0 => drop(decode::<model::Tree>(body)),
            1 => drop(decode::<model::Process>(body)),
            2 => drop(decode::<model::Thread>(body)),
            3 => drop(decode::<model::Mm>(body)),
            4 => drop(decode::<model::FdTable>(body)),
            5 => drop(decode::<model::OpenFile>(body)),
            _ => {}
        },
    }
});
