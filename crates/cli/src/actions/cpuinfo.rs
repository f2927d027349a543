//! `cpuinfo`: what programs may use of a CPU, written down, and compared with another's.
//!
//! A program that has seen what its CPU can do goes on doing that where it is restored. So `cpuinfo.img` lists the
//! instruction sets of one machine, and whatever of it another one lacks is named there.

use std::arch::is_x86_feature_detected;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use freezeframe::{Error, Kind, Result, Target};
use freezeframe_error::{ResultExt, SysExt};
use serde_json::{Value, json};

use crate::grammar::{Line, Stop, Usage};
use crate::log::Log;
use crate::outcome;

/// The file, in the directory of the image.
const FILE: &str = "cpuinfo.img";
const VERSION: u64 = 1;

/// Runs it; the exit code.
pub(crate) fn run(line: &Line) -> Result<i32, Stop> {
    let what = line.words().first().and_then(|w| w.to_str());
    let act = match what {
        Some("dump") => dump,
        Some("check") => check,
        _ => return Err(Usage("cpuinfo needs to know what: dump or check".to_owned()).into()),
    };
    let dir = line.value("images-dir").map_or(".".into(), PathBuf::from);
    let log = Log::open(line)?;
    super::say_ignored(line, &log);
    super::close_fds(line)?;
    Ok(match act(&dir.join(FILE)) {
        Ok(()) => {
            log.success();
            if let Some(caller) = &line.caller {
                caller.done();
            }
            outcome::DONE
        }
        Err(e) => super::failed(line, &log, &e.leaving(Target::Untouched)),
    })
}

fn dump(file: &Path) -> Result<()> {
    let text = json!({"version": VERSION, "arch": std::env::consts::ARCH, "features": features()});
    fs::write(file, format!("{text}\n"))
        .sys("write")
        .on(file.display())
}

fn check(file: &Path) -> Result<()> {
    let text = fs::read(file).sys("open").on(file.display())?;
    let odd = || Error::new(Kind::ImageCorrupt, "this is no list of what a CPU can do");
    let read: Value =
        serde_json::from_slice(&text).map_err(|e| odd().caused_by(e).on(file.display()))?;
    let of_it = || {
        let known = read["version"] == VERSION && read["arch"] == std::env::consts::ARCH;
        let all = read["features"].as_array().filter(|_| known)?;
        all.iter().map(Value::as_str).collect::<Option<Vec<&str>>>()
    };
    let wanted = of_it().ok_or_else(|| odd().on(file.display()))?;
    let here = features();
    let lacking: Vec<&str> = wanted.into_iter().filter(|f| !here.contains(f)).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let what = format!(
        "this CPU lacks what the image's had: {}",
        lacking.join(", ")
    );
    Err(Error::unsupported(what).on(file.display()))
}

/// The instruction sets there are beyond those of every x86-64.
fn features() -> BTreeSet<&'static str> {
    macro_rules! there {
        ($($name:tt)*) => {
            [$(($name, is_x86_feature_detected!($name))),*]
        };
    }
    let all = there!(
        "sse3" "pclmulqdq" "ssse3" "fma" "cmpxchg16b" "sse4.1" "sse4.2" "movbe" "popcnt" "aes" "xsave" "avx" "f16c"
        "rdrand" "lzcnt" "sse4a" "tbm" "bmi1" "avx2" "bmi2" "rtm" "rdseed" "adx" "sha" "xsaveopt" "xsavec" "xsaves"
        "avx512f" "avx512dq" "avx512ifma" "avx512cd" "avx512bw" "avx512vl" "avx512vbmi" "avx512vbmi2" "gfni" "vaes"
        "vpclmulqdq" "avx512vnni" "avx512bitalg" "avx512vpopcntdq" "avx512vp2intersect" "avx512bf16" "avx512fp16"
        "avxvnni" "avxifma" "avxneconvert" "avxvnniint8" "avxvnniint16" "sha512" "sm3" "sm4"
    );
    let there = all.into_iter().filter(|(_, there)| *there);
    there.map(|(name, _)| name).collect()
}
