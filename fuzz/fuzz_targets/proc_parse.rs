//! Any bytes as what a file of `/proc/PID` says.
#![no_main]

use freezeframe_sys::proc::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = parse::maps(data);
    let _ = parse::smaps(data);
    let _ = parse::stat(data);
    let _ = parse::status(data);
    let _ = parse::children(data);
    let _ = parse::fdinfo(data);
    let _ = parse::limits(data);
    let _ = parse::timers(data);
    let _ = parse::syscall(data);
    let _ = parse::sched_exec_start(data);
    let _ = parse::cgroups(data);
    let _ = parse::mountinfo(data);
    let _ = parse::namespace_link(data);
});
