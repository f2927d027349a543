use super::*;
use std::time::{Duration, Instant};

#[test]
fn names_are_distinct() {
    let mut all: Vec<&str> = TABLE
        .iter()
        .flat_map(|p| p.aliases.iter().copied().chain([p.name]))
        .collect();
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count);
    assert!(one("no such feature").is_none());
    assert_eq!(one("get_rseq_conf").unwrap().name, "ptrace_get_rseq_conf");
}

/// Our state that a probe could have changed.
fn state() -> (Vec<u64>, Vec<Pid>, usize, Vec<u8>, String) {
    let us = ProcDir::open(Pid::this()).unwrap();
    let namespaces = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
    let status = us.task(crate::Tid::this()).unwrap().status().unwrap();
    (
        namespaces
            .iter()
            .map(|ns| us.namespace(ns).unwrap())
            .collect(),
        us.children().unwrap(),
        us.fds().unwrap().len(),
        us.read("loginuid").unwrap_or_default(),
        format!(
            "{:?} {:?} {} {}",
            status.uids, status.seccomp, status.no_new_privs, status.sig_blk
        ),
    )
}

#[test]
fn everything_is_tried_and_we_stay_as_we_are() {
    let before = state();
    let start = Instant::now();
    let all = all();
    let took = start.elapsed();
    assert_eq!(state(), before);
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!(all.len(), names().count());
    for feature in &all {
        println!(
            "{:<30} {:<9} {} {}",
            feature.name, feature.needed, feature.present, feature.detail
        );
        assert!(
            feature.present || !feature.detail.is_empty(),
            "{}",
            feature.name
        );
    }
    println!("{took:?}");
    // What every other test here, and the whole of freezeframe, uses works.
    for feature in all.iter().filter(|f| f.needed == Level::Required) {
        assert!(feature.present, "{feature:?}");
    }
    // What can be known in another way.
    let present = |name: &str| all.iter().find(|f| f.name == name).unwrap().present;
    assert_eq!(present("pagemap_scan"), crate::pagemap::has_pagemap_scan());
    let exists = |path: &str| std::path::Path::new(path).exists();
    assert_eq!(present("loginuid"), exists("/proc/self/loginuid"));
    assert!(!present("tun") || exists("/dev/net/tun"));
    assert!(!present("apparmor_stacking") || exists("/sys/kernel/security/apparmor"));
    assert!(!present("timens") || exists("/proc/self/ns/time"));
}

#[test]
fn rights_are_those_of_the_thread() {
    let all = capabilities().unwrap();
    let held = ProcDir::open(Pid::this())
        .unwrap()
        .status()
        .unwrap()
        .cap_eff;
    for cap in &all {
        assert_eq!(cap.held, held & 1 << cap.number != 0, "{}", cap.name);
        assert!(cap.name.starts_with("CAP_") && !cap.lost.is_empty());
    }
    let number = |name: &str| all.iter().find(|c| c.name == name).unwrap().number;
    assert_eq!(number("CAP_SYS_RESOURCE"), 24);
    assert_eq!(number("CAP_CHECKPOINT_RESTORE"), 40);
    in_first_user_namespace().unwrap();
}
