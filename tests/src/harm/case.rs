//! One program and one action of the command, struck again and again; after each blow everything has to be as it was.

use super::left::{Left, own_namespaces};
use super::strike::{self, Blow, Call, Struck, When, Whom};
use super::subject::Subject;
use crate::run::{DEADLINE, Scene, Target};
use crate::snapshot::{children, state_of, threads};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use std::fs;
use std::time::Duration;

/// What the command is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// `dump --leave-running`
    Running,
    /// `dump --live`
    Live,
    /// `dump`
    Dump,
    /// `restore`
    Restore,
}

impl Action {
    /// All of them.
    pub const ALL: [Action; 4] = [Action::Running, Action::Live, Action::Dump, Action::Restore];

    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Action::Running => "dump --leave-running",
            Action::Live => "dump --live",
            Action::Dump => "dump",
            Action::Restore => "restore",
        }
    }
}

/// What happens to the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL, after a step.
    KillAtStep(Whom),
    /// SIGKILL, after so many calls of one sort.
    KillAtCall(Whom, Call, u8),
    /// A call of one sort, the n-th, fails with this error.
    ErrorAtCall(i32, Call, u8),
    /// SIGKILL, at any instant.
    KillAnyTime(Whom),
    /// A signal that asks it to end, as a service manager or a terminal sends it.
    Asked(Signal),
    /// A call that fails with this error.
    Error(i32),
    /// SIGSTOP at any instant, and SIGCONT a while later: only a pause.
    Paused(Whom),
    /// Held after a step, and let go a while later.
    PausedAtStep(Whom),
    /// SIGSTOP at any instant, and SIGKILL a while later.
    StoppedAndKilled(Whom),
}

impl Fault {
    /// The `n`-th of the kills: the two processes and both at once in equal shares, at steps and at any time.
    pub fn kill(n: u64) -> Fault {
        let whom = Whom::ALL[n as usize % Whom::ALL.len()];
        if (n / Whom::ALL.len() as u64).is_multiple_of(2) {
            Fault::KillAtStep(whom)
        } else {
            Fault::KillAnyTime(whom)
        }
    }

    /// The `n`-th of the signals.
    pub fn asked(n: u64) -> Fault {
        Fault::Asked([Signal::SIGTERM, Signal::SIGINT][n as usize % 2])
    }

    /// The `n`-th of the failing calls.
    pub fn error(n: u64) -> Fault {
        let all = [Errno::EIO, Errno::EPERM, Errno::ENOMEM, Errno::ENOSPC];
        Fault::Error(all[n as usize % all.len()] as i32)
    }

    /// The `n`-th of the pauses.
    pub fn paused(n: u64) -> Fault {
        let whom = Whom::ALL[n as usize % Whom::ALL.len()];
        match n / Whom::ALL.len() as u64 % 3 {
            0 => Fault::Paused(whom),
            1 => Fault::PausedAtStep(whom),
            _ => Fault::StoppedAndKilled(whom),
        }
    }

    /// For tables.
    pub fn name(self) -> String {
        match self {
            Fault::Paused(whom) => format!("SIGSTOP for 30 ms at any instant, {}", whom.name()),
            Fault::PausedAtStep(whom) => format!("SIGSTOP for 30 ms after a step, {}", whom.name()),
            Fault::StoppedAndKilled(whom) => {
                format!(
                    "SIGSTOP at any instant, SIGKILL 30 ms later, {}",
                    whom.name()
                )
            }
            Fault::KillAtCall(whom, call, n) => {
                format!("SIGKILL after {}, {n} times, {}", call.name(), whom.name())
            }
            Fault::ErrorAtCall(errno, call, _) => {
                format!("{:?} from {}", Errno::from_raw(errno), call.name())
            }
            Fault::KillAtStep(whom) => format!("SIGKILL after a step, {}", whom.name()),
            Fault::KillAnyTime(whom) => format!("SIGKILL at any instant, {}", whom.name()),
            Fault::Asked(signal) => format!("{signal}, at a step"),
            Fault::Error(errno) => format!("{:?} from a system call", Errno::from_raw(errno)),
        }
    }

    fn blow(self) -> Blow {
        match self {
            Fault::KillAtStep(whom) | Fault::KillAtCall(whom, ..) | Fault::KillAnyTime(whom) => {
                Blow::Signal(whom, Signal::SIGKILL)
            }
            // A terminal sends to both; the one that traces has to leave it to the other.
            Fault::Asked(Signal::SIGINT) => Blow::Signal(Whom::Both, Signal::SIGINT),
            Fault::Asked(signal) => Blow::Signal(Whom::Visible, signal),
            Fault::Error(errno) | Fault::ErrorAtCall(errno, ..) => {
                Blow::Fail(Errno::from_raw(errno))
            }
            Fault::Paused(whom) | Fault::PausedAtStep(whom) => {
                Blow::Pause(whom, PAUSE, Signal::SIGCONT)
            }
            Fault::StoppedAndKilled(whom) => Blow::Pause(whom, PAUSE, Signal::SIGKILL),
        }
    }
}

/// How long the command is stopped.
const PAUSE: Duration = Duration::from_millis(30);

/// Numbers that look random, the same each time from the same seed (SplitMix64).
#[derive(Debug)]
pub struct Dice(pub u64);

impl Dice {
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n.max(1)
    }
}

/// How long an action takes when nobody strikes: to know where blows may fall.
#[derive(Clone, Copy, Debug, Default)]
struct Measure {
    deeds: u64,
    calls: u64,
    time: Duration,
}

/// A program under way.
struct Session {
    subject: Subject,
    action: Action,
    target: Target,
    left: Left,
}

/// Blows for one run of a program, so that it checks itself often.
const A_SESSION: usize = 10;

/// How often a blow is tried until one falls before the end.
const TRIES: usize = 8;

/// Strikes with all of the faults in turn, until it is `over`. Says of each whether it was survived.
pub fn run(
    program: &str,
    action: Action,
    faults: &[Fault],
    dice: &mut Dice,
    over: &dyn Fn() -> bool,
    mut tell: impl FnMut(Fault, Result<(), String>),
) -> Result<(), String> {
    // What others have there would be taken for ours.
    own_namespaces()?;
    let mut measure = None;
    for (round, part) in faults.chunks(A_SESSION).enumerate() {
        if over() {
            break;
        }
        let (subject, target) = Subject::start(program)?;
        let mut session = Session {
            left: Left::look()?,
            subject,
            action,
            target,
        };
        let measure = match measure {
            Some(known) => known,
            None => *measure.insert(session.measure()?),
        };
        let mut harmed = false;
        for (n, &fault) in part.iter().enumerate().take_while(|_| !over()) {
            let place = (round * A_SESSION + n) as u64;
            let place = (place, faults.len() as u64);
            // One that falls behind the end is none.
            let mut falls = || session.struck(fault, measure, place, dice);
            let hit = (0..TRIES).map(|_| falls()).find(|hit| *hit != Ok(false));
            match hit.unwrap_or(Ok(false)) {
                Ok(true) => tell(fault, Ok(())),
                Ok(false) => {}
                Err(e) => {
                    tell(fault, Err(e));
                    harmed = true;
                    break;
                }
            }
        }
        if !harmed {
            session.scene().await_alone(&session.target)?;
            let ended = session.subject.finish(session.target);
            ended.map_err(|e| format!("at the end of {} blows: {e}", part.len()))?;
        }
    }
    Ok(())
}

impl Session {
    fn scene(&self) -> &Scene {
        self.subject.scene()
    }

    fn words<'w>(&self, dir: &'w str, pid: &'w str) -> Vec<&'w str> {
        let mut words = match self.action {
            Action::Restore => vec!["restore", "-D", dir, "-d"],
            _ => vec!["dump", "-t", pid, "-D", dir, "--no-sync"],
        };
        match self.action {
            Action::Running => words.push("--leave-running"),
            Action::Live => words.push("--live"),
            Action::Dump => {}
            Action::Restore => {
                words.extend(self.subject.restore_args());
                return words;
            }
        }
        words.extend(self.subject.dump_args());
        words
    }

    fn act(&self, when: When, blow: Blow) -> Result<Struck, String> {
        let dir = self.scene().path("img");
        fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        let (dir, pid) = (dir.to_string_lossy(), self.target.pid.to_string());
        strike::run(&self.words(&dir, &pid), when, blow)
    }

    /// What there has to be before the action.
    fn prepare(&mut self) -> Result<(), String> {
        if self.action == Action::Dump {
            // So that an image there is this dump's.
            let _ = fs::remove_dir_all(self.scene().path("img"));
        }
        if self.action == Action::Restore {
            self.dump_whole()?;
        }
        Ok(())
    }

    fn dump_whole(&self) -> Result<(), String> {
        let args = self.subject.dump_args();
        let dumped = self.scene().dump_pid(self.target.pid, "img", args)?;
        dumped.must_exit(0)?;
        self.gone()
    }

    fn restore_whole(&mut self) -> Result<(), String> {
        let args = self.subject.restore_args();
        self.target = self.scene().restore_pid(self.target.pid, "img", args)?.0;
        Ok(())
    }

    /// All of the tree goes, those who are not known by name too.
    fn gone(&self) -> Result<(), String> {
        self.scene().await_gone(&self.subject.before, DEADLINE)?;
        self.scene().await_alone(&self.target)
    }

    fn measure(&mut self) -> Result<Measure, String> {
        let blow = [
            Blow::Signal(Whom::Both, Signal::SIGKILL),
            Blow::Fail(Errno::EIO),
        ];
        let mut whole = |when, blow| -> Result<Struck, String> {
            self.prepare()?;
            let struck = self.act(when, blow)?;
            if struck.outcome.code != Some(0) {
                return Err(format!("without any blow: {}", struck.outcome.told()));
            }
            if self.action == Action::Dump {
                self.gone()?;
                self.restore_whole()?;
            }
            Ok(struck)
        };
        let deeds = whole(When::Never, blow[0])?.steps;
        let calls = whole(When::Never, blow[1])?.steps;
        // A time that never comes.
        let clock = whole(When::After(Duration::ZERO), Blow::Fail(Errno::EIO))?;
        Ok(Measure {
            deeds,
            calls,
            time: clock.outcome.took,
        })
    }

    /// One blow and all that has to hold after it. False if it fell behind the end.
    fn struck(
        &mut self,
        fault: Fault,
        measure: Measure,
        (place, of): (u64, u64),
        dice: &mut Dice,
    ) -> Result<bool, String> {
        self.prepare()
            .map_err(|e| format!("before the blow: {e}"))?;
        // Each blow has its part of the way, and falls anywhere in it.
        let mut within = |whole: u64| 1 + (place * whole + dice.below(whole)) / of.max(1);
        let when = match fault {
            Fault::KillAtCall(_, call, n) => When::Call(call, n.into()),
            Fault::ErrorAtCall(_, call, n) => When::Call(call, n.into()),
            Fault::KillAnyTime(_) | Fault::Paused(_) | Fault::StoppedAndKilled(_) => When::After(
                Duration::from_micros(within(measure.time.as_micros() as u64)),
            ),
            Fault::Error(_) => When::Step(within(measure.calls)),
            _ => When::Step(within(measure.deeds)),
        };
        let struck = self.act(when, fault.blow())?;
        let said = format!(
            "{}, {} ({when:?} of {measure:?})",
            self.action.name(),
            struck.place.as_deref().unwrap_or("after its end"),
        );
        let told = |e: String| format!("{said}: {e}\n{}", struck.outcome.told());
        if struck.outcome.stderr.contains("panicked") {
            return Err(told("it panicked".to_owned()));
        }
        if matches!(fault, Fault::Paused(_) | Fault::PausedAtStep(_))
            && struck.outcome.code != Some(0)
        {
            return Err(told("it did not end well".to_owned()));
        }
        match self.action {
            Action::Dump => self.after_dump(),
            Action::Restore => self.after_restore(),
            _ => self.after_leaving(),
        }
        .map_err(told)?;
        Ok(struck.place.is_some())
    }

    /// The tree runs on as it was, with nothing beside it.
    fn unharmed(&self) -> Result<(), String> {
        self.scene().await_alone(&self.target)?;
        self.is_there_with(self.subject.settled_differences(self.target))?;
        // What an image needs whose tree is dead stays until its restore.
        self.left.nothing(self.scene())
    }

    fn after_leaving(&mut self) -> Result<(), String> {
        self.unharmed()?;
        self.image()?;
        let again = self.act(
            When::After(Duration::ZERO),
            Blow::Signal(Whom::Tracer, Signal::SIGCONT),
        )?;
        again
            .outcome
            .must_exit(0)
            .map_err(|e| format!("the next: {e}"))?;
        self.only_this_image()
    }

    /// Whether there is an image; a broken one is a finding.
    fn image(&self) -> Result<bool, String> {
        if !self.scene().path("img/freezeframe.img").exists() {
            return Ok(false);
        }
        self.scene()
            .verify("img")
            .map_err(|e| format!("the image: {e}"))?;
        Ok(true)
    }

    /// Nothing is left of runs that were struck.
    fn only_this_image(&self) -> Result<(), String> {
        let names = fs::read_dir(self.scene().path("img")).map_err(|e| e.to_string())?;
        let names: Vec<String> = names
            .filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()))
            .collect();
        let mut ids: Vec<&str> = names
            .iter()
            .filter(|n| *n != "freezeframe.img")
            .map(|n| n.rsplit_once('-').map_or(n.as_str(), |(id, _)| id))
            .collect();
        ids.sort_unstable();
        ids.dedup();
        if ids.len() > 1 || ids.iter().any(|id| !id.starts_with("pages-")) {
            return Err(format!("files left behind: {names:?}"));
        }
        Ok(())
    }

    fn alive(&self) -> Vec<i32> {
        // The first thread of a process in which another calls exec is dead for a moment.
        let there = |tid: i32| !matches!(state_of(tid), None | Some('Z'));
        let pids = self.subject.before.pids.iter().copied();
        pids.filter(|pid| threads(*pid).into_iter().any(there))
            .collect()
    }

    fn after_dump(&mut self) -> Result<(), String> {
        let complete = self.image()?;
        match self.all_or_nothing()? {
            Ok(()) => {
                self.unharmed()?;
                self.dump_whole().map_err(|e| format!("the next: {e}"))?;
                self.only_this_image()?;
            }
            Err(e) if !complete => return Err(e),
            // There is always one of the two.
            Err(_) => self.gone()?,
        }
        self.restore_whole()?;
        self.unharmed().map_err(|e| format!("restored: {e}"))
    }

    fn after_restore(&mut self) -> Result<(), String> {
        if self.all_or_nothing()?.is_err() {
            self.gone()?;
            self.restore_whole().map_err(|e| format!("the next: {e}"))?;
        }
        self.unharmed()
    }

    /// Waits until it is over, or all of the tree goes: an error of which what is missed is told.
    fn all_or_nothing(&self) -> Result<Result<(), String>, String> {
        let mut is = Ok(());
        self.subject.look_anew();
        let settled = self.scene().await_that(
            "all or nothing of the tree",
            || {
                reap_but(self.target.pid);
                is = self.is_there_with(self.subject.differences(self.target));
                Ok(is.is_ok() || self.alive().is_empty())
            },
            None,
        );
        match settled {
            Ok(()) => Ok(is),
            Err(e) => Err(format!("{e}\n{}", is.err().unwrap_or_default())),
        }
    }

    fn is_there_with(&self, differences: Vec<String>) -> Result<(), String> {
        if self.alive().is_empty() {
            Err("nothing of it is there".to_owned())
        } else if differences.is_empty() {
            Ok(())
        } else {
            Err(differences.join("\n"))
        }
    }
}

/// Reaps the dead among our children, but not this one.
fn reap_but(pid: i32) {
    let flags = nix::sys::wait::WaitPidFlag::WNOHANG;
    for child in children(std::process::id() as i32) {
        if child != pid || state_of(child) == Some('Z') {
            let _ = nix::sys::wait::waitpid(Pid::from_raw(child), Some(flags));
        }
    }
}
