//! timerfd_create(2): timers read from a descriptor.
//!
//! A timer set to a time from then (relative) goes on with the time that was
//! left. One set to a point in time (TFD_TIMER_ABSTIME) goes off at that point
//! of its clock, at once if it has passed; where the clock began anew since
//! (CLOCK_MONOTONIC and CLOCK_BOOTTIME of another boot), with the time that was left.

use freezeframe_error::{Result, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use freezeframe_sys::fd::ioctl::TFD_IOC_SET_TICKS;
use freezeframe_sys::proc::FdInfo;
use nix::time::ClockId;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::{is_anonymous, provide_made, status_flags};

/// See the module.
#[derive(Debug)]
pub struct Timerfd;

static ABOUT: About = About {
    tag: Tag::new(*b"FTIM"),
    version: 1,
    name: "timerfd",
    title: "Timers read from a descriptor",
    manual: "timerfd_create(2)",
    since: "",
    carried: "clock, interval, the time left (relative timers) or the point in time (absolute ones), expirations not yet read",
    refused: "",
    programs: &[
        "events::timerfd",
        "events::timerfd_ticks",
        "events::timerfd_absolute",
    ],
    show: show::<Record>,
};

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    clock: i32,
    /// Expirations not yet read.
    ticks: u64,
    /// TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET.
    set_flags: i32,
    /// Time to the next expiration in ns, 0 if not armed.
    left_ns: u64,
    interval_ns: u64,
    /// The clock at the next expiration, in ns.
    expires_ns: u64,
}

const SECOND: u64 = 1_000_000_000;

/// The clock an alarm clock goes by.
fn base_clock(clock: i32) -> ClockId {
    match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM => ClockId::CLOCK_REALTIME,
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => ClockId::CLOCK_BOOTTIME,
        _ => ClockId::CLOCK_MONOTONIC,
    }
}

fn now(clock: i32) -> Result<u64> {
    let t = nix::time::clock_gettime(base_clock(clock)).sys("clock_gettime")?;
    Ok(t.tv_sec() as u64 * SECOND + t.tv_nsec() as u64)
}

/// `(seconds, nanoseconds)`.
fn time(text: &str) -> Option<u64> {
    let (s, ns) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    let (s, ns): (u64, u64) = (s.trim().parse().ok()?, ns.trim().parse().ok()?);
    s.checked_mul(SECOND)?.checked_add(ns)
}

fn parse(info: &FdInfo) -> Option<Record> {
    Some(Record {
        clock: info.get("clockid")?.parse().ok()?,
        ticks: info.get("ticks")?.parse().ok()?,
        set_flags: i32::from_str_radix(info.get("settime flags")?, 8).ok()?,
        left_ns: time(info.get("it_value")?)?,
        interval_ns: time(info.get("it_interval")?)?,
        expires_ns: 0,
    })
}

impl FileKind for Timerfd {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        is_anonymous(file, b"anon_inode:[timerfd]")
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, _cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let odd = || super::odd(file, "timerfd", &file.info.rest.join(", "));
        // A periodic timer that went off is only counted on, and set again, when
        // somebody asks: timerfd_gettime(2) does that, as it would for the target.
        // (Once more if it goes off in between.)
        let mut record;
        loop {
            freezeframe_sys::fd::ioctl::timerfd_gettime(file.ours()?).map_err(|e| file.blame(e))?;
            record = parse(&file.proc.dir.fdinfo(file.fd)?).ok_or_else(odd)?;
            if record.left_ns != 0 || record.interval_ns == 0 || record.ticks == 0 {
                break;
            }
        }
        if record.left_ns != 0 {
            // Read after the time left, so that it is never too early.
            record.expires_ns = now(record.clock)?.saturating_add(record.left_ns);
        }
        ABOUT.record(file.subject(), &record)
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        let same_boot = freezeframe_sys::clock::boot_id()? == cx.tree.boot_id;
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let nonblock = status_flags(item.common.flags) & libc::O_NONBLOCK;
            let fd = cx.batch.call(
                "timerfd_create",
                libc::SYS_timerfd_create,
                [record.clock.into(), (nonblock | libc::TFD_CLOEXEC).into()],
            );
            let now = now(record.clock)?;
            let (value, ticks) = setting(&record, now, same_boot);
            if value != 0 || record.set_flags != 0 {
                let spec: Vec<u8> = [
                    record.interval_ns / SECOND,
                    record.interval_ns % SECOND,
                    value / SECOND,
                    value % SECOND,
                ]
                .iter()
                .flat_map(|n| n.to_ne_bytes())
                .collect();
                let spec = cx.batch.data(&spec);
                cx.batch.call(
                    "timerfd_settime",
                    libc::SYS_timerfd_settime,
                    [fd.into(), record.set_flags.into(), spec.into(), Arg::Imm(0)],
                );
            }
            if ticks != 0 {
                let data = cx.batch.data(&ticks.to_ne_bytes());
                cx.batch.call(
                    "ioctl(TFD_IOC_SET_TICKS)",
                    libc::SYS_ioctl,
                    [fd.into(), TFD_IOC_SET_TICKS.into(), data.into()],
                );
            }
            provide_made(cx, item.id, fd, item.common.flags, nonblock);
        }
        Ok(())
    }
}

/// What timerfd_settime(2) is given as the first expiration, and the ticks to
/// set after it.
fn setting(record: &Record, now: u64, same_boot: bool) -> (u64, u64) {
    if record.left_ns == 0 {
        return (0, record.ticks);
    }
    if record.set_flags & libc::TFD_TIMER_ABSTIME == 0 {
        return (record.left_ns, record.ticks);
    }
    let realtime = base_clock(record.clock) == ClockId::CLOCK_REALTIME;
    if !realtime && !same_boot {
        return (now.saturating_add(record.left_ns), record.ticks);
    }
    // One that has passed goes off as it is set; setting the ticks would take
    // that one expiration away again.
    let passed = record.expires_ns <= now && record.ticks != 0;
    (record.expires_ns, record.ticks + u64::from(passed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(lines: &[&str]) -> FdInfo {
        FdInfo {
            rest: lines.iter().map(|l| l.to_string()).collect(),
            ..FdInfo::default()
        }
    }

    #[test]
    fn fdinfo_is_read() {
        let lines = [
            "clockid: 1",
            "ticks: 22",
            "settime flags: 01",
            "it_value: (3, 10094713)",
            "it_interval: (0, 50000000)",
        ];
        let record = parse(&info(&lines)).unwrap();
        assert_eq!((record.clock, record.ticks, record.set_flags), (1, 22, 1));
        assert_eq!(
            (record.left_ns, record.interval_ns),
            (3_010_094_713, 50_000_000)
        );
        for i in 0..lines.len() {
            let mut cut = lines.to_vec();
            cut.remove(i);
            assert!(parse(&info(&cut)).is_none());
        }
        assert_eq!(time("(18446744073709551615, 1)"), None);
    }

    #[test]
    fn relative_timers_keep_the_time_left_and_absolute_ones_their_point() {
        let mut r = Record {
            clock: libc::CLOCK_MONOTONIC,
            ticks: 0,
            set_flags: 0,
            left_ns: 5,
            interval_ns: 0,
            expires_ns: 105,
        };
        assert_eq!(setting(&r, 1000, true), (5, 0));
        r.set_flags = libc::TFD_TIMER_ABSTIME;
        assert_eq!(setting(&r, 1000, true), (105, 0));
        assert_eq!(setting(&r, 1000, false), (1005, 0));
        r.ticks = 3;
        assert_eq!(setting(&r, 1000, true), (105, 4));
        assert_eq!(setting(&r, 50, true), (105, 3));
        r.clock = libc::CLOCK_REALTIME_ALARM;
        assert_eq!(setting(&r, 50, false), (105, 3));
        r.left_ns = 0;
        assert_eq!(setting(&r, 50, false), (0, 3));
    }
}
