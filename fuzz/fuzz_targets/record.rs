//! Any bytes as the body of any kind's record.
#![no_main]

use freezeframe_kinds::registry;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&which, body)) = data.split_first() else {
        return;
    };
    let kinds = registry::all().count();
    if let Some((_, about)) = registry::all().nth(usize::from(which) % kinds) {
        registry::fuzz_decode(about.tag, body);
    }
});
