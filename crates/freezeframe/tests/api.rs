//! The library as a program uses it: any thread, reapers around it, a signal
//! mask of its own.

#![allow(missing_docs)]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use freezeframe::{Dump, Error, Events, Kind, Level, Phase, Restore, Result, Step, Target};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

/// Prints numbers, and ends with status 9 at SIGUSR1.
const PROGRAM: &str = "import os,signal,time\nos.setsid()\nos.closerange(3, 256)\n\
    signal.signal(signal.SIGUSR1, lambda *a: os._exit(9))\ni = 0\nwhile True:\n  print(i, flush=True)\n  i += 1\n  time.sleep(0.01)";

struct Victim {
    child: Child,
    dir: tempfile::TempDir,
}

impl Victim {
    fn start() -> Victim {
        let dir = tempfile::tempdir().unwrap();
        let out = std::fs::File::options()
            .create(true)
            .append(true)
            .open(dir.path().join("out"))
            .unwrap();
        let mut command = Command::new("python3");
        command
            .args(["-c", PROGRAM])
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(Stdio::null());
        let victim = Victim {
            child: command.spawn().unwrap(),
            dir,
        };
        until(|| victim.lines().len() > 2);
        victim
    }
    fn pid(&self) -> i32 {
        self.child.id() as i32
    }
    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }
    fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("out")).unwrap();
        text.lines().map(str::to_owned).collect()
    }
    fn goes_on(&self) {
        let now = self.lines().len();
        until(|| self.lines().len() > now + 1);
        for (i, line) in self.lines().iter().enumerate() {
            assert!(
                *line == i.to_string() || i + 1 == self.lines().len(),
                "line {i} is {line}"
            );
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn until(mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn end(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[test]
fn there_and_back_from_any_thread() {
    let mut victim = Victim::start();
    let (pid, image) = (victim.pid(), victim.image());
    let mask = SigSet::thread_get_mask().unwrap();

    let dir = image.clone();
    let dump = move || {
        Dump::new(pid)
            .images_dir(dir)
            .deadline(Duration::from_secs(10))
            .run()
    };
    let report = std::thread::spawn(dump).join().unwrap().unwrap();
    assert_eq!((report.processes, report.threads), (1, 1));
    assert!(report.pages_written > 0 && report.frozen > Duration::ZERO);
    assert_eq!(
        std::fs::metadata(&image).unwrap().permissions().mode() & 0o777,
        0o700
    );
    victim.child.wait().unwrap();

    let restored = std::thread::spawn(move || Restore::new(image).run())
        .join()
        .unwrap()
        .unwrap();
    assert_eq!(restored.pid(), pid);
    // The thread that called has ended; the tree does not mind.
    victim.goes_on();
    assert_eq!(
        SigSet::thread_get_mask().unwrap(),
        mask,
        "the caller's mask is as it was"
    );
    end(pid, Signal::SIGUSR1);
    assert_eq!(restored.wait().unwrap().code(), Some(9));
}

#[test]
fn a_detached_tree_leaves_no_zombie() {
    let mut victim = Victim::start();
    let (pid, image) = (victim.pid(), victim.image());
    Dump::new(pid).images_dir(&image).run().unwrap();
    victim.child.wait().unwrap();
    Restore::new(&image).run().unwrap().detach();
    victim.goes_on();
    end(pid, Signal::SIGKILL);
    until(|| !Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_caller_who_reaps_gets_the_exit_status() {
    let mut victim = Victim::start();
    let (pid, image) = (victim.pid(), victim.image());
    Dump::new(pid).images_dir(&image).run().unwrap();
    victim.child.wait().unwrap();
    let restored = Restore::new(&image).reap(false).run().unwrap();
    // A dump of it must not let the thread that restored it believe that it has ended.
    let dump = Dump::new(pid).images_dir(&image).leave_running(true);
    dump.run().unwrap();
    victim.goes_on();
    end(pid, Signal::SIGUSR1);
    let status = nix::sys::wait::waitpid(Pid::from_raw(pid), None);
    assert_eq!(
        status,
        Ok(nix::sys::wait::WaitStatus::Exited(Pid::from_raw(pid), 9))
    );
    assert_eq!(restored.wait().unwrap_err().kind(), Kind::Usage);
}

/// A program that reaps whatever it can, as some do on SIGCHLD.
#[test]
fn a_reaper_in_the_caller_does_no_harm() {
    let victim = Victim::start();
    let stop = Arc::new(AtomicBool::new(false));
    let reaper = {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            use nix::sys::wait::{WaitPidFlag, waitpid};
            while !stop.load(Ordering::Relaxed) {
                let _ = waitpid(
                    None::<Pid>,
                    Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL | WaitPidFlag::WUNTRACED),
                );
            }
        })
    };
    for _ in 0..5 {
        Dump::new(victim.pid())
            .images_dir(victim.image())
            .leave_running(true)
            .run()
            .unwrap();
        victim.goes_on();
    }
    stop.store(true, Ordering::Relaxed);
    reaper.join().unwrap();
}

/// What a test wants of its events.
#[derive(Default)]
struct Wants {
    panics_in: Option<Phase>,
    refuses: Option<&'static str>,
    heard: Mutex<Vec<String>>,
}

impl Events for Wants {
    fn log(&self, _level: Level, _text: fmt::Arguments<'_>) {}
    fn phase(&self, phase: Phase) {
        assert!(self.panics_in != Some(phase), "no {phase}");
        self.heard.lock().unwrap().push(phase.to_string());
    }
    fn progress(&self, _done: u64, _total: u64) {}
    fn step(&self, step: Step) -> Result<()> {
        let name = format!("{step:?}");
        let refuses = self.refuses.is_some_and(|s| name.starts_with(s));
        self.heard.lock().unwrap().push(name);
        match refuses {
            true => Err(Error::new(Kind::Cancelled, "not today")),
            false => Ok(()),
        }
    }
    fn cancelled(&self) -> bool {
        false
    }
}

#[test]
fn events_come_in_order_and_may_veto() {
    let victim = Victim::start();
    let wants = Arc::new(Wants::default());
    let dump = || {
        Dump::new(victim.pid())
            .images_dir(victim.image())
            .leave_running(true)
    };
    dump().events(wants.clone()).run().unwrap();
    let heard = wants.heard.lock().unwrap().join(" ");
    assert_eq!(
        heard,
        "plan PreDump freeze ExternalFiles collect pages PostDump thaw commit"
    );

    let image = victim.image().join("freezeframe.img");
    let before = std::fs::read(&image).unwrap();
    let wants = Wants {
        refuses: Some("PostDump"),
        ..Wants::default()
    };
    let e = dump().events(Arc::new(wants)).run().unwrap_err();
    assert_eq!(
        (e.kind(), e.target()),
        (Kind::Cancelled, Target::Running),
        "{e:?}"
    );
    assert_eq!(
        std::fs::read(&image).unwrap(),
        before,
        "the older image is still there"
    );
    victim.goes_on();
}

#[test]
fn a_restore_can_be_stopped_until_the_tree_runs() {
    let mut victim = Victim::start();
    let (pid, image) = (victim.pid(), victim.image());
    Dump::new(pid).images_dir(&image).run().unwrap();
    victim.child.wait().unwrap();
    let restore = |refuses| {
        let wants = Wants {
            refuses: Some(refuses),
            ..Wants::default()
        };
        Restore::new(&image).events(Arc::new(wants)).run()
    };
    for step in [
        "PreRestore",
        "SetupNamespaces",
        "PostSetupNamespaces",
        "PostRestore",
        "PreResume",
    ] {
        let e = restore(step).unwrap_err();
        assert_eq!(
            (e.kind(), e.target()),
            (Kind::Cancelled, Target::Untouched),
            "{e:?}"
        );
        until(|| !Path::new(&format!("/proc/{pid}")).exists());
    }
    let restored = restore("PostResume").unwrap();
    assert!(restored.report().warnings[0].contains("not today"));
    victim.goes_on();
    end(pid, Signal::SIGUSR1);
    assert_eq!(restored.wait().unwrap().code(), Some(9));
}

#[test]
fn a_panic_is_an_error_and_the_target_goes_on() {
    let victim = Victim::start();
    for phase in [Phase::Freeze, Phase::Collect, Phase::Pages] {
        let wants = Wants {
            panics_in: Some(phase),
            ..Wants::default()
        };
        let dump = Dump::new(victim.pid())
            .images_dir(victim.image())
            .events(Arc::new(wants));
        let e = dump.run().unwrap_err();
        assert_eq!(e.kind(), Kind::Bug, "{e:?}");
        assert!(e.to_string().contains(&format!("no {phase}")), "{e}");
        victim.goes_on();
        assert!(
            !victim.image().exists(),
            "the directory made for it is gone"
        );
    }
}

#[test]
fn errors_say_how_the_target_is() {
    let dir = tempfile::tempdir().unwrap();
    let e = Dump::new(1 << 30)
        .images_dir(dir.path().join("x"))
        .run()
        .unwrap_err();
    assert_eq!(
        (e.kind(), e.target()),
        (Kind::TargetGone, Target::Untouched),
        "{e:?}"
    );
    let e = Dump::new(1 << 30).run().unwrap_err();
    assert_eq!(
        (e.kind(), e.target()),
        (Kind::Usage, Target::Untouched),
        "{e:?}"
    );
    let e = Dump::new(std::process::id() as i32)
        .images_dir(dir.path().join("x"))
        .run()
        .unwrap_err();
    assert_eq!(e.target(), Target::Untouched, "{e:?}");
    let e = Restore::new(dir.path()).run().unwrap_err();
    assert_eq!(
        (e.kind(), e.target()),
        (Kind::ImageIncomplete, Target::Untouched),
        "{e:?}"
    );
}
