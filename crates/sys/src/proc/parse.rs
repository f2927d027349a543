//! The texts of `/proc` turned into values.
//!
//! Every function takes any bytes: what does not look as the kernel writes it
//! is an error, never a panic. Lines and fields that are not known are passed
//! over, since kernels add some.

use super::{
    Cgroup, FdInfo, Limit, Map, Mount, SeccompMode, Smap, Stat, Status, SyscallState, TimerInfo,
    TimerNotify, VmFlags,
};
use freezeframe_error::{Error, Kind, Result};

/// The error for a text that is not as the kernel writes it: what was sought
/// and the beginning of what was found.
pub(crate) fn unexpected(what: &str, text: &[u8]) -> Error {
    let shown = &text[..text.len().min(80)];
    Error::new(
        Kind::Io,
        format!("cannot parse {what}: \"{}\"", shown.escape_ascii()),
    )
}

/// `text` without blanks and newlines at its ends.
pub fn trimmed(text: &[u8]) -> &[u8] {
    text.trim_ascii()
}

/// An unsigned decimal number, and nothing else.
pub fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    let mut n = 0u64;
    for &b in text {
        let digit = b.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        n = n.checked_mul(10)?.checked_add(digit.into())?;
    }
    Some(n)
}

/// A decimal number that may have a minus before it.
pub fn decimal_signed(text: &[u8]) -> Option<i64> {
    match text.strip_prefix(b"-") {
        None => i64::try_from(decimal(text)?).ok(),
        Some(digits) => 0i64.checked_sub_unsigned(decimal(digits)?),
    }
}

/// A hexadecimal number of at most 16 digits, `0x` before it allowed.
pub fn hexadecimal(text: &[u8]) -> Option<u64> {
    let digits = text.strip_prefix(b"0x").unwrap_or(text);
    if digits.is_empty() || digits.len() > 16 {
        return None;
    }
    let mut n = 0u64;
    for &b in digits {
        n = n << 4 | u64::from((b as char).to_digit(16)?);
    }
    Some(n)
}

fn octal(text: &[u8]) -> Option<u32> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u32, |n, &b| {
        n.checked_mul(8)?.checked_add((b as char).to_digit(8)?)
    })
}

fn int(text: &[u8]) -> Option<i32> {
    i32::try_from(decimal_signed(text)?).ok()
}

fn word(text: &[u8]) -> Option<u32> {
    u32::try_from(decimal(text)?).ok()
}

/// The lines of a text; none of them holds its newline.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.strip_suffix(b"\n")
        .unwrap_or(text)
        .split(|&b| b == b'\n')
        .filter(|line| !line.is_empty())
}

/// The fields of a line between blanks and tabs.
fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|b| matches!(b, b' ' | b'\t'))
        .filter(|field| !field.is_empty())
}

fn split_once(text: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let i = text.iter().position(|&b| b == at)?;
    Some((&text[..i], &text[i + 1..]))
}

/// Undoes octal escapes (`\012`) of the bytes in `of`; others stay as they are.
pub fn unescape_octal(text: &[u8], of: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&b, tail)) = rest.split_first() {
        if b == b'\\'
            && let Some(digits) = tail.get(..3)
            && let Some(byte) = octal(digits).and_then(|n| u8::try_from(n).ok())
            && of.contains(&byte)
        {
            out.push(byte);
            rest = &tail[3..];
        } else {
            out.push(b);
            rest = tail;
        }
    }
    out
}

/// Reads fields one after another from a line that is consumed from its start.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    /// Everything up to the byte `end`, which is consumed too.
    fn until(&mut self, end: u8) -> Option<&'a [u8]> {
        let (field, rest) = split_once(self.0, end)?;
        self.0 = rest;
        Some(field)
    }

    /// A lower-case hexadecimal number and the byte `end` behind it.
    fn hex(&mut self, end: u8) -> Option<u64> {
        let mut n = 0u64;
        for (i, &b) in self.0.iter().enumerate() {
            let digit = match b {
                b'0'..=b'9' => b - b'0',
                b'a'..=b'f' => b - b'a' + 10,
                _ if b == end && i > 0 => {
                    self.0 = &self.0[i + 1..];
                    return Some(n);
                }
                _ => return None,
            };
            if i == 16 {
                return None;
            }
            n = n << 4 | u64::from(digit);
        }
        None
    }
}

/// One line of `maps`, without its newline.
fn map_line(line: &[u8]) -> Option<Map> {
    let mut at = Cursor(line);
    let start = at.hex(b'-')?;
    let end = at.hex(b' ')?;
    if end < start {
        return None;
    }
    let &[r, w, x, s, b' ', ref rest @ ..] = at.0 else {
        return None;
    };
    let bit = |b: u8, letter: u8| match b {
        b'-' => Some(false),
        _ if b == letter => Some(true),
        _ => None,
    };
    at = Cursor(rest);
    let offset = at.hex(b' ')?;
    let dev_major = at.hex(b':')?;
    let dev_minor = at.hex(b' ')?;
    let inode = decimal(at.until(b' ')?)?;
    let pad = at.0.iter().take_while(|&&b| b == b' ').count();
    let path = &at.0[pad..];
    Some(Map {
        start,
        end,
        read: bit(r, b'r')?,
        write: bit(w, b'w')?,
        exec: bit(x, b'x')?,
        shared: match s {
            b's' => true,
            b'p' => false,
            _ => return None,
        },
        offset,
        dev_major: u32::try_from(dev_major).ok()?,
        dev_minor: u32::try_from(dev_minor).ok()?,
        inode,
        path: if path.contains(&b'\\') {
            unescape_octal(path, b"\n")
        } else {
            path.to_vec()
        },
    })
}

/// `/proc/PID/maps`.
pub fn maps(text: &[u8]) -> Result<Vec<Map>> {
    // A line is about 100 bytes with a path, 50 without.
    let mut all = Vec::with_capacity(text.len() / 64);
    for line in lines(text) {
        all.push(map_line(line).ok_or_else(|| unexpected("maps", line))?);
    }
    Ok(all)
}

/// `/proc/PID/smaps`.
pub fn smaps(text: &[u8]) -> Result<Vec<Smap>> {
    let mut all: Vec<Smap> = Vec::with_capacity(text.len() / 700);
    for line in lines(text) {
        let bad = || unexpected("smaps", line);
        // Keys begin with a capital, addresses never do.
        if !line[0].is_ascii_uppercase() {
            all.push(Smap {
                map: map_line(line).ok_or_else(bad)?,
                ..Smap::default()
            });
            continue;
        }
        let smap = all.last_mut().ok_or_else(bad)?;
        let (key, value) = split_once(line, b':').ok_or_else(bad)?;
        let size = match key {
            b"Rss" => &mut smap.rss,
            b"Pss" => &mut smap.pss,
            b"Shared_Clean" => &mut smap.shared_clean,
            b"Shared_Dirty" => &mut smap.shared_dirty,
            b"Private_Clean" => &mut smap.private_clean,
            b"Private_Dirty" => &mut smap.private_dirty,
            b"Anonymous" => &mut smap.anonymous,
            b"KSM" => &mut smap.ksm,
            b"AnonHugePages" => &mut smap.anon_huge_pages,
            b"Swap" => &mut smap.swap,
            b"Locked" => &mut smap.locked,
            b"KernelPageSize" => &mut smap.kernel_page_size,
            b"ProtectionKey" => {
                smap.protection_key = word(value.trim_ascii()).ok_or_else(bad)?;
                continue;
            }
            b"VmFlags" => {
                for code in fields(value) {
                    smap.vm_flags |= match code {
                        &[a, b] => VmFlags::of_code([a, b]),
                        _ => VmFlags::UNKNOWN,
                    };
                }
                continue;
            }
            _ => continue,
        };
        *size = kilobytes(value).ok_or_else(bad)?;
    }
    Ok(all)
}

/// `  12 kB` in bytes.
fn kilobytes(value: &[u8]) -> Option<u64> {
    decimal(value.trim_ascii().strip_suffix(b"kB")?.trim_ascii())?.checked_mul(1024)
}

/// `/proc/PID/stat`.
pub fn stat(text: &[u8]) -> Result<Stat> {
    stat_fields(text).ok_or_else(|| unexpected("stat", text))
}

fn stat_fields(text: &[u8]) -> Option<Stat> {
    // The name stands between the first "(" and the last ")": it may hold
    // both, blanks and newlines.
    let open = text.iter().position(|&b| b == b'(')?;
    let close = text.iter().rposition(|&b| b == b')')?;
    let comm = text.get(open + 1..close)?;
    let mut rest = fields(text[close + 1..].trim_ascii());
    let state = match rest.next()? {
        &[letter] => letter as char,
        _ => return None,
    };

    // The fields of proc_pid_stat(5) from (4) on.
    fn next<'a, T>(
        rest: &mut impl Iterator<Item = &'a [u8]>,
        parse: fn(&[u8]) -> Option<T>,
    ) -> Option<T> {
        parse(rest.next()?)
    }
    let rest = &mut rest;
    let mut s = Stat {
        pid: int(text[..open].trim_ascii())?,
        comm: comm.to_vec(),
        state,
        ppid: next(rest, int)?,
        pgrp: next(rest, int)?,
        session: next(rest, int)?,
        tty_nr: next(rest, int)?,
        tpgid: next(rest, int)?,
        flags: next(rest, word)?,
        minflt: next(rest, decimal)?,
        cminflt: next(rest, decimal)?,
        majflt: next(rest, decimal)?,
        cmajflt: next(rest, decimal)?,
        utime: next(rest, decimal)?,
        stime: next(rest, decimal)?,
        cutime: next(rest, decimal_signed)?,
        cstime: next(rest, decimal_signed)?,
        priority: next(rest, decimal_signed)?,
        nice: next(rest, decimal_signed)?,
        num_threads: next(rest, decimal_signed)?,
        ..Stat::default()
    };
    next(rest, decimal_signed)?; // itrealvalue, always 0
    s.start_time = next(rest, decimal)?;
    s.vsize = next(rest, decimal)?;
    s.rss = next(rest, decimal_signed)?;
    s.rsslim = next(rest, decimal)?;
    s.start_code = next(rest, decimal)?;
    s.end_code = next(rest, decimal)?;
    s.start_stack = next(rest, decimal)?;
    s.kstkesp = next(rest, decimal)?;
    s.kstkeip = next(rest, decimal)?;
    for _signal_blocked_sigignore_sigcatch in 0..4 {
        next(rest, decimal)?; // cut to 31 bits: `status` has them whole
    }
    s.wchan = next(rest, decimal)?;
    for _nswap_cnswap in 0..2 {
        next(rest, decimal)?;
    }
    s.exit_signal = next(rest, int)?;
    s.processor = next(rest, int)?;
    s.rt_priority = next(rest, word)?;
    s.policy = next(rest, word)?;
    s.delayacct_blkio_ticks = next(rest, decimal)?;
    s.guest_time = next(rest, decimal)?;
    s.cguest_time = next(rest, decimal_signed)?;
    s.start_data = next(rest, decimal)?;
    s.end_data = next(rest, decimal)?;
    s.start_brk = next(rest, decimal)?;
    s.arg_start = next(rest, decimal)?;
    s.arg_end = next(rest, decimal)?;
    s.env_start = next(rest, decimal)?;
    s.env_end = next(rest, decimal)?;
    s.exit_code = next(rest, int)?;
    Some(s)
}

/// `/proc/PID/status`.
pub fn status(text: &[u8]) -> Result<Status> {
    const REQUIRED: u32 = 7;
    let mut s = Status::default();
    let mut seen = 0;
    for line in lines(text) {
        let Some((key, value)) = split_once(line, b':') else {
            continue;
        };
        seen += u32::from(matches!(
            key,
            b"State" | b"Tgid" | b"Pid" | b"PPid" | b"TracerPid" | b"Uid" | b"Gid"
        ));
        status_line(&mut s, key, value).ok_or_else(|| unexpected("status", line))?;
    }
    if seen != REQUIRED {
        return Err(unexpected("status", text));
    }
    Ok(s)
}

/// Enters one line. `None`: its value is not as it should be.
fn status_line(s: &mut Status, key: &[u8], value: &[u8]) -> Option<()> {
    // A name may begin and end with blanks.
    let name = value.strip_prefix(b"\t").unwrap_or(value);
    let value = value.trim_ascii();
    let flag = |value| Some(decimal(value)? != 0);
    match key {
        b"Name" => s.name = unescape_name(name),
        b"Umask" => s.umask = Some(octal(value)?),
        b"State" => s.state = *value.first()? as char,
        b"Tgid" => s.tgid = int(value)?,
        b"Ngid" => s.ngid = int(value)?,
        b"Pid" => s.pid = int(value)?,
        b"PPid" => s.ppid = int(value)?,
        b"TracerPid" => s.tracer_pid = int(value)?,
        b"Uid" => s.uids = list(value, word)?.try_into().ok()?,
        b"Gid" => s.gids = list(value, word)?.try_into().ok()?,
        b"FDSize" => s.fd_size = decimal(value)?,
        b"Groups" => s.groups = list(value, word)?,
        b"NStgid" => s.ns_tgid = list(value, int)?,
        b"NSpid" => s.ns_pid = list(value, int)?,
        b"NSpgid" => s.ns_pgid = list(value, int)?,
        b"NSsid" => s.ns_sid = list(value, int)?,
        b"Kthread" => s.kthread = flag(value)?,
        b"VmPeak" => s.vm_peak = Some(kilobytes(value)?),
        b"VmSize" => s.vm_size = Some(kilobytes(value)?),
        b"VmLck" => s.vm_lck = Some(kilobytes(value)?),
        b"VmRSS" => s.vm_rss = Some(kilobytes(value)?),
        b"RssAnon" => s.rss_anon = Some(kilobytes(value)?),
        b"RssFile" => s.rss_file = Some(kilobytes(value)?),
        b"RssShmem" => s.rss_shmem = Some(kilobytes(value)?),
        b"VmPTE" => s.vm_pte = Some(kilobytes(value)?),
        b"VmSwap" => s.vm_swap = Some(kilobytes(value)?),
        b"HugetlbPages" => s.hugetlb_pages = Some(kilobytes(value)?),
        b"CoreDumping" => s.core_dumping = flag(value)?,
        b"THP_enabled" => s.thp_enabled = Some(flag(value)?),
        b"Threads" => s.threads = word(value)?,
        b"SigQ" => {
            let (queued, limit) = split_once(value, b'/')?;
            s.sig_q = (decimal(queued)?, decimal(limit)?);
        }
        b"SigPnd" => s.sig_pnd = hexadecimal(value)?,
        b"ShdPnd" => s.shd_pnd = hexadecimal(value)?,
        b"SigBlk" => s.sig_blk = hexadecimal(value)?,
        b"SigIgn" => s.sig_ign = hexadecimal(value)?,
        b"SigCgt" => s.sig_cgt = hexadecimal(value)?,
        b"CapInh" => s.cap_inh = hexadecimal(value)?,
        b"CapPrm" => s.cap_prm = hexadecimal(value)?,
        b"CapEff" => s.cap_eff = hexadecimal(value)?,
        b"CapBnd" => s.cap_bnd = hexadecimal(value)?,
        b"CapAmb" => s.cap_amb = hexadecimal(value)?,
        b"NoNewPrivs" => s.no_new_privs = flag(value)?,
        b"Seccomp" => {
            s.seccomp = match value {
                b"0" => SeccompMode::Disabled,
                b"1" => SeccompMode::Strict,
                b"2" => SeccompMode::Filter,
                _ => return None,
            }
        }
        b"Seccomp_filters" => s.seccomp_filters = Some(word(value)?),
        b"voluntary_ctxt_switches" => s.voluntary_ctxt_switches = decimal(value)?,
        b"nonvoluntary_ctxt_switches" => s.nonvoluntary_ctxt_switches = decimal(value)?,
        _ => {}
    }
    Some(())
}

fn list<T>(value: &[u8], parse: fn(&[u8]) -> Option<T>) -> Option<Vec<T>> {
    fields(value).map(parse).collect()
}

/// Undoes `\n` and `\\`, which `status` puts in names.
fn unescape_name(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter().copied().peekable();
    while let Some(b) = bytes.next() {
        out.push(match (b, bytes.peek()) {
            (b'\\', Some(b'n')) => {
                bytes.next();
                b'\n'
            }
            (b'\\', Some(b'\\')) => {
                bytes.next();
                b'\\'
            }
            _ => b,
        });
    }
    out
}

/// `/proc/PID/task/TID/children`.
pub fn children(text: &[u8]) -> Result<Vec<crate::Pid>> {
    list(trimmed(text), int)
        .map(|pids| pids.into_iter().map(crate::Pid).collect())
        .ok_or_else(|| unexpected("children", text))
}

/// `/proc/PID/fdinfo/FD`.
pub fn fdinfo(text: &[u8]) -> Result<FdInfo> {
    let mut info = FdInfo::default();
    let mut seen = 0;
    for line in lines(text) {
        let bad = || unexpected("fdinfo", line);
        let (key, value) = split_once(line, b':').unwrap_or((b"", b""));
        let value = value.trim_ascii();
        match key {
            b"pos" => info.pos = decimal_signed(value).ok_or_else(bad)?,
            b"flags" => info.flags = octal(value).ok_or_else(bad)?,
            b"mnt_id" => info.mnt_id = int(value).ok_or_else(bad)?,
            // inotify's lines are "inotify wd:1 ino:...", so their key is another.
            b"ino" => info.ino = decimal(value).ok_or_else(bad)?,
            _ => {
                info.rest.push(String::from_utf8_lossy(line).into_owned());
                continue;
            }
        }
        seen += 1;
    }
    if seen < 3 {
        return Err(unexpected("fdinfo", text));
    }
    Ok(info)
}

/// `/proc/PID/limits`.
pub fn limits(text: &[u8]) -> Result<[Limit; 16]> {
    /// By the numbers of `RLIMIT_*`.
    const NAMES: [&[u8]; 16] = [
        b"Max cpu time",
        b"Max file size",
        b"Max data size",
        b"Max stack size",
        b"Max core file size",
        b"Max resident set",
        b"Max processes",
        b"Max open files",
        b"Max locked memory",
        b"Max address space",
        b"Max file locks",
        b"Max pending signals",
        b"Max msgqueue size",
        b"Max nice priority",
        b"Max realtime priority",
        b"Max realtime timeout",
    ];
    let value = |field: &[u8]| match field {
        b"unlimited" => Some(u64::MAX),
        digits => decimal(digits),
    };
    let mut limits = [None; 16];
    for line in lines(text) {
        let Some(i) = NAMES.iter().position(|name| {
            line.strip_prefix(*name)
                .is_some_and(|rest| rest.starts_with(b" "))
        }) else {
            continue;
        };
        let mut values = fields(&line[NAMES[i].len()..]).map(value);
        let (Some(Some(soft)), Some(Some(hard))) = (values.next(), values.next()) else {
            return Err(unexpected("limits", line));
        };
        limits[i] = Some(Limit { soft, hard });
    }
    let mut all = [Limit::default(); 16];
    for (i, limit) in limits.iter().enumerate() {
        all[i] = limit.ok_or_else(|| {
            let name = String::from_utf8_lossy(NAMES[i]);
            Error::new(Kind::Io, format!("cannot parse limits: no \"{name}\""))
        })?;
    }
    Ok(all)
}

/// `/proc/PID/timers`.
pub fn timers(text: &[u8]) -> Result<Vec<TimerInfo>> {
    let mut all: Vec<TimerInfo> = Vec::new();
    for line in lines(text) {
        timer_line(&mut all, line).ok_or_else(|| unexpected("timers", line))?;
    }
    Ok(all)
}

fn timer_line(all: &mut Vec<TimerInfo>, line: &[u8]) -> Option<()> {
    let (key, value) = split_once(line, b':')?;
    let value = value.trim_ascii();
    if key == b"ID" {
        all.push(TimerInfo {
            id: int(value)?,
            ..TimerInfo::default()
        });
        return Some(());
    }
    let timer = all.last_mut()?;
    match key {
        b"signal" => {
            let (signo, sigev_value) = split_once(value, b'/')?;
            timer.signo = int(signo)?;
            timer.sigev_value = match sigev_value {
                b"(null)" => 0,
                hex => hexadecimal(hex)?,
            };
        }
        b"notify" => {
            let (how, whom) = split_once(value, b'/')?;
            timer.notify = match how {
                b"signal" => TimerNotify::Signal,
                b"none" => TimerNotify::None,
                b"thread" => TimerNotify::Thread,
                _ => return None,
            };
            let (what, target) = split_once(whom, b'.')?;
            timer.to_thread = match what {
                b"pid" => false,
                b"tid" => true,
                _ => return None,
            };
            timer.target = int(target)?;
        }
        b"ClockID" => timer.clock = int(value)?,
        _ => {}
    }
    Some(())
}

/// `/proc/PID/syscall`.
pub fn syscall(text: &[u8]) -> Result<SyscallState> {
    syscall_fields(trimmed(text)).ok_or_else(|| unexpected("syscall", text))
}

fn syscall_fields(text: &[u8]) -> Option<SyscallState> {
    if text == b"running" {
        return Some(SyscallState::Running);
    }
    let mut rest = fields(text);
    let nr = decimal_signed(rest.next()?)?;
    let words: Vec<u64> = rest.map(hexadecimal).collect::<Option<_>>()?;
    match *words.as_slice() {
        [sp, pc] => Some(SyscallState::BlockedOutside { sp, pc }),
        [a, b, c, d, e, f, sp, pc] => Some(SyscallState::Blocked {
            nr,
            args: [a, b, c, d, e, f],
            sp,
            pc,
        }),
        _ => None,
    }
}

/// `se.exec_start` of `/proc/PID/task/TID/sched`, in nanoseconds.
pub fn sched_exec_start(text: &[u8]) -> Option<u64> {
    // The first line holds the name of the thread, which may hold newlines and
    // even this word; but behind the name come a blank and "(", never a colon.
    lines(text).find_map(|line| {
        let value = line
            .strip_prefix(b"se.exec_start")?
            .trim_ascii_start()
            .strip_prefix(b":")?
            .trim_ascii();
        let (millis, nanos) = split_once(value, b'.')?;
        if nanos.len() != 6 {
            return None;
        }
        decimal(millis)?
            .checked_mul(1_000_000)?
            .checked_add(decimal(nanos)?)
    })
}

/// `/proc/PID/cgroup`.
pub fn cgroups(text: &[u8]) -> Result<Vec<Cgroup>> {
    lines(text)
        .map(|line| cgroup_line(line).ok_or_else(|| unexpected("cgroup", line)))
        .collect()
}

fn cgroup_line(line: &[u8]) -> Option<Cgroup> {
    let (hierarchy, rest) = split_once(line, b':')?;
    // "name=" of a hierarchy may hold a colon; a path begins with a slash.
    let slash = rest.windows(2).position(|pair| pair == b":/")?;
    Some(Cgroup {
        hierarchy: word(hierarchy)?,
        controllers: rest[..slash]
            .split(|&b| b == b',')
            .filter(|name| !name.is_empty())
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect(),
        path: rest[slash + 1..].to_vec(),
    })
}

/// `/proc/PID/mountinfo`.
pub fn mountinfo(text: &[u8]) -> Result<Vec<Mount>> {
    lines(text)
        .map(|line| mount_line(line).ok_or_else(|| unexpected("mountinfo", line)))
        .collect()
}

fn mount_line(line: &[u8]) -> Option<Mount> {
    // Fields may be empty (a source of ""), so each single blank separates.
    let path = |field: &[u8]| unescape_octal(field, b" \t\n\\#");
    let mut rest = line.split(|&b| b == b' ');
    let id = int(rest.next()?)?;
    let parent = int(rest.next()?)?;
    let (major, minor) = split_once(rest.next()?, b':')?;
    let mut mount = Mount {
        id,
        parent,
        dev_major: word(major)?,
        dev_minor: word(minor)?,
        root: path(rest.next()?),
        mount_point: path(rest.next()?),
        options: path(rest.next()?),
        ..Mount::default()
    };
    loop {
        match rest.next()? {
            b"-" => break,
            tag => mount
                .propagation
                .push(String::from_utf8_lossy(tag).into_owned()),
        }
    }
    mount.fs_type = path(rest.next()?);
    mount.source = path(rest.next()?);
    mount.super_options = rest.next()?.to_vec();
    Some(mount)
}

/// The number in `mnt:[4026531841]`.
pub fn namespace_link(link: &[u8]) -> Option<u64> {
    let (_, number) = split_once(link, b'[')?;
    decimal(number.strip_suffix(b"]")?)
}

#[cfg(test)]
mod tests;
