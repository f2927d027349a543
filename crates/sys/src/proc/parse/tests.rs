use super::*;

#[test]
fn maps_of_every_shape() {
    let text = b"5640ef342000-5640ef344000 r--p 00000000 fe:00 247030                     /usr/bin/cat\n\
56411d2a4000-56411d2c5000 rw-p 00000000 00:00 0                          [heap]\n\
7f17cefc5000-7f17cefe7000 rw-p 00000000 00:00 0 \n\
7f0000000000-7f0000001000 rwxs 7fffffff000 1fe:abcde 18446744073709551615       /tmp/a b\\012c (deleted)\n\
7f0000001000-7f0000002000 ---p 00000000 00:00 0                          [anon:a [b] c]\n\
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
    let all = maps(text).unwrap();
    assert_eq!(all.len(), 6);
    assert_eq!(all[0].start, 0x5640_ef34_2000);
    assert_eq!(all[0].len(), 0x2000);
    assert!(all[0].read && !all[0].write && !all[0].exec && !all[0].shared);
    assert_eq!(
        (all[0].dev_major, all[0].dev_minor, all[0].inode),
        (0xfe, 0, 247030)
    );
    assert_eq!(all[0].path, b"/usr/bin/cat");
    assert_eq!(all[2].path, b"");
    let odd = &all[3];
    assert_eq!(odd.path, b"/tmp/a b\nc (deleted)");
    assert_eq!(odd.deleted(), Some(b"/tmp/a b\nc".as_slice()));
    assert_eq!(all[0].deleted(), None);
    assert!(odd.shared && odd.exec);
    assert_eq!(odd.offset, 0x7ff_ffff_f000);
    assert_eq!(
        (odd.dev_major, odd.dev_minor, odd.inode),
        (0x1fe, 0xabcde, u64::MAX)
    );
    assert_eq!(all[4].path, b"[anon:a [b] c]");
    assert!(all[5].is_kernel_made() && !all[4].is_kernel_made());
    assert_eq!(
        odd.to_string(),
        "7f0000000000-7f0000001000 rwxs 7fffffff000 1fe:abcde 18446744073709551615 /tmp/a b\\nc (deleted)"
    );
    // A backslash that is no newline stays, and so does a half escape.
    let all = maps(b"1000-2000 r--p 00000000 00:01 7 /a\\040b\\01\n").unwrap();
    assert_eq!(all[0].path, b"/a\\040b\\01");
}

#[test]
fn broken_maps_are_errors() {
    for bad in [
        "1000",
        "1000-",
        "1000-2000",
        "1000-2000 r--p",
        "1000-2000 r--p 0 00:00",
        "1000-2000 r--p 0 00:00 0",
        "2000-1000 r--p 0 00:00 0 ",
        "11112222333344445-2 r--p 0 00:00 0 ",
        "-2000 r--p 0 00:00 0 ",
        "1000-2000 R--p 0 00:00 0 ",
        "1000-2000 r--q 0 00:00 0 ",
        "1000-2000 r--p 0 100000000:00 0 ",
        "1000-2000 r--p 0 00:00 18446744073709551616 ",
        "\0",
    ] {
        assert!(maps(bad.as_bytes()).is_err(), "{bad}");
    }
    assert_eq!(maps(b"").unwrap(), []);
}

#[test]
fn smaps_with_flags() {
    let text = b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0                          [stack]\n\
Size:                  4 kB\nKernelPageSize:        4 kB\nRss:                  12 kB\nPss:                   3 kB\n\
Anonymous:             8 kB\nSwap:                  1 kB\nLocked:                0 kB\nTHPeligible:           0\n\
ProtectionKey:         3\nVmFlags: rd wr mr mw me gd ac zz \n\
7f0000001000-7f0000002000 r--s 00001000 00:01 5                          /dev/zero (deleted)\n\
Rss:                   0 kB\nVmFlags: \n";
    let all = smaps(text).unwrap();
    assert_eq!(all.len(), 2);
    let s = &all[0];
    assert_eq!(
        (s.rss, s.pss, s.anonymous, s.swap),
        (12 << 10, 3 << 10, 8 << 10, 1 << 10)
    );
    assert_eq!((s.kernel_page_size, s.protection_key), (4096, 3));
    assert!(s.vm_flags.contains(VmFlags::GROWS_DOWN | VmFlags::ACCOUNT));
    assert!(s.vm_flags.contains(VmFlags::UNKNOWN));
    assert!(!s.vm_flags.contains(VmFlags::LOCKED));
    assert_eq!(all[1].vm_flags, VmFlags::empty());
    assert!(smaps(b"Rss: 1 kB\n").is_err(), "a value before any VMA");
    assert!(smaps(b"1000-2000 r--p 0 00:00 0 \nRss: x kB\n").is_err());
    assert!(smaps(b"1000-2000 r--p 0 00:00 0 \nRss: 99999999999999999999 kB\n").is_err());
    assert!(smaps(b"1000-2000 r--p 0 00:00 0 \nRss: 18446744073709551 kB\n").is_err());
}

const STAT: &[u8] = b"6279 (NAME) R 6277 6277 3559 -34816 -1 4194304 101 2 3 4 5 6 -7 8 20 -5 1 0 130405 3133440 412 18446744073709551615 93951222652928 93951222672809 140730066300480 0 0 0 0 0 0 0 0 0 17 1 2 3 0 0 0 93951222688816 93951222690432 93951911874560 140730066303696 140730066303734 140730066303734 140730066305003 256\n";

fn stat_named(name: &[u8]) -> Vec<u8> {
    let at = STAT.windows(4).position(|w| w == b"NAME").unwrap();
    [&STAT[..at], name, &STAT[at + 4..]].concat()
}

#[test]
fn stat_with_odd_names() {
    for name in [
        b"cat".as_slice(),
        b"",
        b") R 1 1 (",
        b"a b\nc)",
        b"((((",
        b"))))",
        b"\xff\\ \t",
    ] {
        let s = stat(&stat_named(name)).unwrap();
        assert_eq!(s.comm, name);
        assert_eq!((s.pid, s.ppid, s.pgrp, s.session), (6279, 6277, 6277, 3559));
        assert_eq!((s.state, s.tty_nr, s.tpgid, s.nice), ('R', -34816, -1, -5));
        assert_eq!(
            (s.start_time, s.exit_signal, s.exit_code),
            (130405, 17, 256)
        );
        assert_eq!(
            (s.cutime, s.processor, s.rt_priority, s.policy),
            (-7, 1, 2, 3)
        );
        assert_eq!(s.start_stack, 140730066300480);
        assert_eq!(s.env_end, 140730066305003);
        assert_eq!(s.start_brk, 93951911874560);
    }
}

#[test]
fn broken_stat_is_an_error() {
    for len in 0..STAT.len() - 4 {
        assert!(stat(&STAT[..len]).is_err(), "cut at {len}");
    }
    for bad in ["", ")(", "1 )(", "1 (a", "x (a) R", "1 (a)", "1 (a) RR 1"] {
        assert!(stat(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn status_with_everything() {
    let text = b"Name:\t\t a\\n\\\\b : \nUmask:\t0027\nState:\tT (stopped)\nTgid:\t10\nNgid:\t0\nPid:\t11\nPPid:\t9\n\
TracerPid:\t5\nUid:\t1\t2\t3\t4294967295\nGid:\t5\t6\t7\t8\nFDSize:\t256\nGroups:\t4 24 27 \nNStgid:\t10\t1\n\
NSpid:\t11\t2\nNSpgid:\t10\t0\nNSsid:\t10\t0\nKthread:\t0\nVmPeak:\t    3060 kB\nVmSize:\t  3000 kB\n\
VmRSS:\t    1760 kB\nCoreDumping:\t0\nTHP_enabled:\t1\nuntag_mask:\t0xffffffffffffffff\nThreads:\t3\nSigQ:\t2/96365\n\
SigPnd:\t0000000000000001\nShdPnd:\t0000000000000002\nSigBlk:\t8000000000000000\nSigIgn:\t0000000000001000\n\
SigCgt:\t00000001800046eb\nCapInh:\t0000000000000000\nCapPrm:\t000001fffeffffff\nCapEff:\t000001fffeffffff\n\
CapBnd:\t000001fffeffffff\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t3\n\
voluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t8\n";
    let s = status(text).unwrap();
    assert_eq!(s.name, b"\t a\n\\b : ");
    assert_eq!(s.umask, Some(0o27));
    assert_eq!(
        (s.state, s.tgid, s.pid, s.ppid, s.tracer_pid),
        ('T', 10, 11, 9, 5)
    );
    assert_eq!(s.uids, [1, 2, 3, u32::MAX]);
    assert_eq!(s.gids, [5, 6, 7, 8]);
    assert_eq!(s.groups, [4, 24, 27]);
    assert_eq!((s.ns_tgid, s.ns_pid), (vec![10, 1], vec![11, 2]));
    assert_eq!((s.ns_pgid, s.ns_sid), (vec![10, 0], vec![10, 0]));
    assert_eq!((s.vm_size, s.vm_swap), (Some(3000 << 10), None));
    assert_eq!((s.sig_q, s.sig_pnd, s.shd_pnd), ((2, 96365), 1, 2));
    assert_eq!((s.sig_blk, s.sig_cgt), (1 << 63, 0x1_8000_46eb));
    assert_eq!(s.cap_eff, 0x1ff_feff_ffff);
    assert!(s.no_new_privs && !s.core_dumping);
    assert_eq!(
        (s.seccomp, s.seccomp_filters, s.threads),
        (SeccompMode::Filter, Some(3), 3)
    );
    assert_eq!(
        (s.voluntary_ctxt_switches, s.nonvoluntary_ctxt_switches),
        (7, 8)
    );

    assert!(status(b"").is_err());
    assert!(status(b"Name:\tx\n").is_err());
    let end = text.windows(5).position(|w| w == b"Gid:\t").unwrap();
    assert!(status(&text[..end]).is_err(), "no Gid");
    let without_group = String::from_utf8(text.to_vec())
        .unwrap()
        .replace("\t7\t8", "");
    assert!(status(without_group.as_bytes()).is_err(), "two GIDs");
}

#[test]
fn fdinfo_of_several_kinds() {
    let text = b"pos:\t-1\nflags:\t02004002\nmnt_id:\t15\nino:\t1057\neventfd-count: ffffffffffffffff\neventfd-id: 7\neventfd-semaphore: 1\n";
    let info = fdinfo(text).unwrap();
    assert_eq!(
        (info.pos, info.flags, info.mnt_id, info.ino),
        (-1, 0o2004002, 15, 1057)
    );
    assert!(info.close_on_exec());
    assert_eq!(info.get("eventfd-count"), Some("ffffffffffffffff"));
    assert_eq!(info.get("eventfd"), None);
    assert_eq!(info.rest.len(), 3);

    let text = b"pos:\t0\nflags:\t00\nmnt_id:\t15\nino:\t1\ninotify wd:2 ino:1 sdev:fe00000 mask:100 ignored_mask:0 fhandle-bytes:8\n\
inotify wd:1 ino:2\nlock:\t1: POSIX  ADVISORY  WRITE 7 fe:00:2 0 EOF\n";
    let info = fdinfo(text).unwrap();
    assert_eq!(info.ino, 1);
    assert_eq!(info.rest[1], "inotify wd:1 ino:2");
    assert_eq!(info.lines("lock").count(), 1);

    // Kernels before 5.14 have no inode here.
    assert_eq!(
        fdinfo(b"pos:\t5\nflags:\t0100002\nmnt_id:\t9\n")
            .unwrap()
            .pos,
        5
    );
    assert!(fdinfo(b"").is_err());
    assert!(fdinfo(b"pos:\t0\nflags:\t8\nmnt_id:\t9\n").is_err());
}

#[test]
fn limits_by_name() {
    let text = b"Limit                     Soft Limit           Hard Limit           Units     \n\
Max cpu time              unlimited            unlimited            seconds   \n\
Max file size             1                    2                    bytes     \n\
Max data size             unlimited            unlimited            bytes     \n\
Max stack size            8388608              unlimited            bytes     \n\
Max core file size        0                    unlimited            bytes     \n\
Max resident set          unlimited            unlimited            bytes     \n\
Max processes             96365                96365                processes \n\
Max open files            20000                20001                files     \n\
Max locked memory         8388608              8388608              bytes     \n\
Max address space         unlimited            unlimited            bytes     \n\
Max file locks            unlimited            unlimited            locks     \n\
Max pending signals       96365                96365                signals   \n\
Max msgqueue size         819200               819200               bytes     \n\
Max nice priority         0                    0                    \n\
Max realtime priority     3                    4                    \n\
Max realtime timeout      unlimited            unlimited            us        \n";
    let all = limits(text).unwrap();
    assert_eq!(all[libc::RLIMIT_FSIZE as usize], Limit { soft: 1, hard: 2 });
    assert_eq!(
        all[libc::RLIMIT_NOFILE as usize],
        Limit {
            soft: 20000,
            hard: 20001
        }
    );
    assert_eq!(
        all[libc::RLIMIT_RTPRIO as usize],
        Limit { soft: 3, hard: 4 }
    );
    assert_eq!(all[libc::RLIMIT_CPU as usize].soft, u64::MAX);
    let cut = text.windows(8).position(|w| w == b"Max nice").unwrap();
    assert!(limits(&text[..cut]).is_err());
    assert!(limits(b"").is_err());
}

#[test]
fn timers_of_every_kind() {
    let text = b"ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
ID: 0\nsignal: 34/0000000000000000\nnotify: signal/tid.2635\nClockID: 1\n\
ID: 7\nsignal: 14/(null)\nnotify: none/pid.0\nClockID: -6\n";
    let all = timers(text).unwrap();
    assert_eq!(all.len(), 3);
    assert_eq!(
        (all[0].id, all[0].signo, all[0].sigev_value),
        (1, 60, 0x7fff_86e4_52a8)
    );
    assert_eq!(
        (all[0].notify, all[0].to_thread, all[0].target),
        (TimerNotify::Signal, false, 2634)
    );
    assert_eq!(
        (all[1].to_thread, all[1].target, all[1].clock),
        (true, 2635, 1)
    );
    assert_eq!(
        (all[2].notify, all[2].clock, all[2].sigev_value),
        (TimerNotify::None, -6, 0)
    );
    assert!(timers(b"signal: 1/0\n").is_err());
    assert!(timers(b"ID: 1\nnotify: loudly/pid.1\n").is_err());
    assert_eq!(timers(b"").unwrap(), []);
}

#[test]
fn syscall_states() {
    assert_eq!(syscall(b"running\n").unwrap(), SyscallState::Running);
    assert_eq!(
        syscall(b"-1 0x7ffe3854a658 0x7f9fb84122ad\n").unwrap(),
        SyscallState::BlockedOutside {
            sp: 0x7ffe_3854_a658,
            pc: 0x7f9f_b841_22ad
        }
    );
    assert_eq!(
        syscall(b"0 0x3 0x1 0x20000 0x0 0xffffffff 0x6 0x7 0x8\n").unwrap(),
        SyscallState::Blocked {
            nr: 0,
            args: [3, 1, 0x20000, 0, 0xffff_ffff, 6],
            sp: 7,
            pc: 8
        }
    );
    for bad in ["", "0", "0 0x3", "x 0x1 0x2", "0 1 2 3"] {
        assert!(syscall(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn exec_start_despite_hostile_names() {
    let tail = b" (6281, #threads: 1)\n----\nse.exec_start                                :       1302765.720243\nse.vruntime : 3.4\n";
    for name in [
        b"cat".as_slice(),
        b"\nse.exec_start",
        b"se.exec_start:1",
        b"x\ny",
    ] {
        let text = [name, tail.as_slice()].concat();
        assert_eq!(sched_exec_start(&text), Some(1_302_765_720_243));
    }
    assert_eq!(sched_exec_start(b""), None);
    assert_eq!(
        sched_exec_start(b"se.exec_start : 99999999999999999999.000000"),
        None
    );
    assert_eq!(sched_exec_start(b"se.exec_start : 1.0"), None);
}

#[test]
fn cgroups_of_both_versions() {
    let all = cgroups(b"9:name=sys:temd:/a:/b\n4:cpu,cpuacct:/\n0::/x y (deleted)\n").unwrap();
    assert_eq!(
        (all[0].hierarchy, all[0].controllers.as_slice()),
        (9, ["name=sys:temd".to_string()].as_slice())
    );
    assert_eq!(all[0].path, b"/a:/b");
    assert_eq!(all[1].controllers, ["cpu", "cpuacct"]);
    assert_eq!(
        (all[2].controllers.len(), all[2].path.as_slice()),
        (0, b"/x y (deleted)".as_slice())
    );
    assert!(cgroups(b"0:/\n").is_err());
}

#[test]
fn mountinfo_with_optional_fields() {
    let text = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n25 1 0:23 / /proc rw - proc  rw\n";
    let all = mountinfo(text).unwrap();
    assert_eq!((all[0].id, all[0].parent, all[0].dev_major), (36, 35, 98));
    assert_eq!(all[0].mount_point, b"/mnt 2");
    assert_eq!(all[0].propagation, ["master:1", "shared:2"]);
    assert_eq!(all[0].fs_type, b"ext3");
    assert_eq!(all[0].super_options, b"rw,errors=continue");
    assert_eq!(
        (all[1].propagation.len(), all[1].source.as_slice()),
        (0, b"".as_slice())
    );
    assert!(mountinfo(b"36 35 98:0 /mnt1 /mnt2 rw\n").is_err());
}

#[test]
fn numbers() {
    assert_eq!(decimal(b"18446744073709551615"), Some(u64::MAX));
    assert_eq!(decimal(b"18446744073709551616"), None);
    assert_eq!(decimal_signed(b"-9223372036854775808"), Some(i64::MIN));
    assert_eq!(decimal_signed(b"-9223372036854775809"), None);
    assert_eq!(decimal_signed(b"-"), None);
    assert_eq!(hexadecimal(b"ffffffffffffffff"), Some(u64::MAX));
    assert_eq!(hexadecimal(b"0x"), None);
    assert_eq!(hexadecimal(b"10000000000000000"), None);
    assert_eq!(namespace_link(b"mnt:[4026531841]"), Some(4026531841));
    assert_eq!(namespace_link(b"mnt"), None);
}

/// Every parser over texts that look almost right: the fuzz targets do it longer.
#[test]
fn no_parser_panics_on_damaged_text() {
    let own = |name: &str| std::fs::read(format!("/proc/self/{name}")).unwrap_or_default();
    let samples = [
        own("maps"),
        own("smaps"),
        own("stat"),
        own("status"),
        own("limits"),
        own("cgroup"),
        own("mountinfo"),
        own("fdinfo/0"),
        own("syscall"),
        own("sched"),
        b"ID: 1\nsignal: 60/7f\nnotify: signal/pid.1\nClockID: 0\n".to_vec(),
    ];
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    for sample in samples.iter().filter(|s| !s.is_empty()) {
        for _ in 0..400 {
            let from = random(sample.len());
            let len = random((sample.len() - from).min(2000) + 1);
            let mut text = sample[from..from + len].to_vec();
            for _ in 0..random(6) {
                if !text.is_empty() {
                    let at = random(text.len());
                    text[at] = b"\n :-()\\0f\xff\0"[random(11)];
                }
            }
            let _ = (
                maps(&text),
                smaps(&text),
                stat(&text),
                status(&text),
                fdinfo(&text),
            );
            let _ = (limits(&text), timers(&text), syscall(&text), cgroups(&text));
            let _ = (
                mountinfo(&text),
                sched_exec_start(&text),
                children(&text),
                namespace_link(&text),
            );
        }
    }
}
