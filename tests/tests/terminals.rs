//! Real programs on terminals: what was typed before a dump is there after the restore, and they are typed on.
//!
//! `real/terminal.py` runs each on a pseudo-terminal that belongs to the tree. What a test types it appends to a file,
//! and what the program shows it finds in another.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{DEADLINE, Mode, Scene, Target, own_terminals};
use freezeframe_tests::snapshot::Snapshot;
use freezeframe_tests::tool::Outcome;
use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

type Done = Result<(), String>;

const PYTHON: &str = "/usr/bin/python3";
const BASH: &[&str] = &["/bin/bash", "--norc", "-i"];

/// A program on a terminal.
struct OnTerminal {
    scene: Scene,
    target: Target,
}

impl OnTerminal {
    fn start(words: &[&str]) -> Result<Self, String> {
        for word in [PYTHON, words[0]] {
            if !Path::new(word).exists() {
                return Err(format!("{word} is missing: see scripts/test"));
            }
        }
        own_terminals()?;
        let scene = Scene::new()?;
        fs::write(scene.path("keys"), "").map_err(|e| e.to_string())?;
        let helper = concat!(env!("CARGO_MANIFEST_DIR"), "/real/terminal.py");
        let dir = scene.dir_text();
        let all = [&[PYTHON, helper, &dir], words].concat();
        let target = scene.start_other(&all)?;
        scene.await_file("screen", &target)?;
        Ok(OnTerminal { scene, target })
    }

    fn type_keys(&self, keys: &str) -> Done {
        let file = fs::OpenOptions::new()
            .append(true)
            .open(self.scene.path("keys"));
        file.and_then(|mut f| f.write_all(keys.as_bytes()))
            .map_err(|e| e.to_string())
    }

    fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.scene.path(name)).unwrap_or_default()).into_owned()
    }

    fn await_text(&self, name: &str, wanted: &str) -> Done {
        let there = || Ok(self.text(name).contains(wanted));
        let what = format!("{wanted:?} in {name}");
        self.scene
            .await_that(&what, there, Some(&self.target))
            .map_err(|e| {
                format!(
                    "{e}; {name}: {:?}; {}",
                    self.text(name),
                    self.scene.complaints()
                )
            })
    }

    /// Types, and waits for what that has to show.
    fn see(&self, keys: &str, shown: &str) -> Done {
        self.type_keys(keys)?;
        self.await_text("screen", shown)
    }

    /// Waits until a job of the shell has the terminal: what is typed before is the shell's.
    fn await_job_in_front(&self) -> Done {
        let in_front = || {
            let now = Snapshot::take(self.target.pid);
            let shell = now.pids.get(1).copied().unwrap_or_default();
            let front = now.values.get(&format!("{shell}/stat/tpgid"));
            Ok(front.is_some_and(|group| *group != shell.to_string()))
        };
        self.scene
            .await_that("a job in front", in_front, Some(&self.target))
    }

    /// A dump that leaves it running, then dump and restore.
    fn cycle(&mut self) -> Done {
        self.scene
            .dump_pid(self.target.pid, "live", &["--leave-running"])?
            .must_exit(0)?;
        let before = Snapshot::take(self.target.pid);
        self.scene
            .dump_pid(self.target.pid, "img", &[])?
            .must_exit(0)?;
        self.scene.await_gone(&before, DEADLINE)?;
        self.target = self.scene.restore_pid(self.target.pid, "img", &[])?.0;
        Ok(())
    }

    fn over(&self) -> Done {
        self.scene
            .await_exit(&self.target)
            .map_err(|e| format!("{e}; screen: {:?}", self.text("screen")))?;
        self.scene.nothing_left()
    }
}

#[test]
fn vim_with_unsaved_text() -> Done {
    let vim = [
        "/usr/bin/vim",
        "-u",
        "NONE",
        "-i",
        "NONE",
        "-n",
        "-N",
        "text",
    ];
    let mut on = OnTerminal::start(&vim)?;
    on.await_text("screen", "~")?;
    on.see("iunsaved words", "unsaved words")?;
    on.cycle()?;
    on.see(" and more", "and more")?;
    on.type_keys("\u{1b}:wq\r")?;
    on.over()?;
    match on.text("text").as_str() {
        "unsaved words and more\n" => Ok(()),
        other => Err(format!("saved: {other:?}")),
    }
}

#[test]
fn bash_with_a_background_job() -> Done {
    let mut on = OnTerminal::start(BASH)?;
    on.await_text("screen", "prompt> ")?;
    on.type_keys("while [ ! -e stop ]; do echo t >> ticks; sleep 0.01; done &\r")?;
    on.await_text("ticks", "t\nt\n")?;
    on.type_keys("echo half of a li")?;
    on.await_text("screen", "half of a li")?;
    on.cycle()?;
    let ticks = on.text("ticks");
    on.await_text("ticks", &format!("{ticks}t\nt\n"))?;
    // The line that was being typed, then job control: to the front, stopped, to the back, ended.
    on.see("ne, number $((40+2))\r", "line, number 42")?;
    on.type_keys("jobs > jobs1\r")?;
    on.await_text("jobs1", "Running")?;
    on.type_keys("fg\r")?;
    on.await_text("screen", "sleep 0.01;\r\ndone\r\n")?;
    on.await_job_in_front()?;
    on.see("\u{1a}", "Stopped")?;
    on.type_keys("bg; jobs > jobs2\r")?;
    on.await_text("jobs2", "Running")?;
    on.type_keys("touch stop; wait; echo over > ended\r")?;
    on.await_text("ended", "over")?;
    on.type_keys("exit 0\r")?;
    on.over()
}

#[test]
fn bash_with_a_command_in_front() -> Done {
    let mut on = OnTerminal::start(BASH)?;
    on.await_text("screen", "prompt> ")?;
    on.see("cat > words\r", "cat > words\r\n")?;
    on.await_job_in_front()?;
    on.see("a line\r", "a line\r\n")?;
    on.await_text("words", "a line\n")?;
    on.see("half", "half")?;
    on.cycle()?;
    on.type_keys("!\r")?;
    on.await_text("words", "a line\nhalf!\n")?;
    on.type_keys("\u{3}")?;
    let prompt = || {
        let screen = on.text("screen");
        let after = screen.split("^C").nth(1);
        Ok(after.is_some_and(|text| text.contains("prompt> ")))
    };
    on.scene
        .await_that("a prompt after ^C", prompt, Some(&on.target))?;
    on.see("echo code $?\r", "code 130")?;
    on.type_keys("exit 0\r")?;
    on.over()
}

#[test]
fn script_of_a_shell() -> Done {
    let script = [
        "/usr/bin/script",
        "-q",
        "-f",
        "-c",
        "/bin/bash --norc -i",
        "typescript",
    ];
    let mut on = OnTerminal::start(&script)?;
    on.await_text("screen", "prompt> ")?;
    on.see("echo before $((1+1))\r", "before 2")?;
    on.cycle()?;
    on.see("echo after $((2+3))\r", "after 5")?;
    on.type_keys("exit 0\r")?;
    on.over()?;
    let written = on.text("typescript");
    match written.contains("before 2") && written.contains("after 5") {
        true => Ok(()),
        false => Err(format!("typescript: {written:?}")),
    }
}

#[test]
fn python_pty_spawn() -> Done {
    let spawn = [
        PYTHON,
        "-c",
        "import pty; pty.spawn(['/bin/sh', '-c', 'echo ready; exec cat'])",
    ];
    let mut on = OnTerminal::start(&spawn)?;
    on.await_text("screen", "ready")?;
    on.see("one\r", "one\r\none\r\n")?;
    on.see("tw", "tw")?;
    on.cycle()?;
    on.see("o\r", "two\r\ntwo\r\n")?;
    on.type_keys("\u{4}")?;
    on.over()
}

#[test]
fn a_terminal_that_somebody_outside_has_open_is_refused() -> Done {
    let mut on = OnTerminal::start(&["/bin/cat"])?;
    on.see("a\r", "a\r\na\r\n")?;
    let outside = fs::File::open("/dev/pts/0").map_err(|e| e.to_string())?;
    let outcome = on.scene.dump_pid(on.target.pid, "refused", &[])?;
    let outcome = outcome.must_exit(1)?;
    if !outcome.stderr.contains("which is outside the tree") {
        return Err(outcome.told());
    }
    drop(outside);
    on.cycle()?;
    on.see("b\r", "b\r\nb\r\n")?;
    on.type_keys("\u{4}")?;
    on.over()
}

#[test]
fn a_number_that_is_taken_is_refused() -> Done {
    let on = OnTerminal::start(&["/bin/cat"])?;
    on.see("a\r", "a\r\na\r\n")?;
    let before = Snapshot::take(on.target.pid);
    on.scene.dump_pid(on.target.pid, "img", &[])?.must_exit(0)?;
    on.scene.await_gone(&before, DEADLINE)?;
    let taker = nix::pty::openpty(None, None).map_err(|e| e.to_string())?;
    let Err(told) = on.scene.restore_pid(on.target.pid, "img", &[]) else {
        return Err("restored onto a number that was taken".to_owned());
    };
    if !told.contains("/dev/pts/0 is taken") {
        return Err(told);
    }
    drop(taker);
    on.scene.nothing_left()?;
    on.scene.restore_pid(on.target.pid, "img", &[])?;
    on.see("b\r", "b\r\nb\r\n")?;
    on.type_keys("\u{4}")?;
    on.over()
}

fn text(scene: &Scene, name: &str) -> String {
    fs::read_to_string(scene.path(name)).unwrap_or_default()
}

fn write(scene: &Scene, name: &str, text: &str) -> Done {
    fs::write(scene.path(name), text).map_err(|e| e.to_string())
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, should_be: T) -> Done {
    match is == should_be {
        true => Ok(()),
        false => Err(format!("{what}: {is:?}, not {should_be:?}")),
    }
}

fn must_say(outcome: &Outcome, words: &str) -> Done {
    match outcome.stderr.contains(words) {
        true => Ok(()),
        false => Err(format!("no {words:?} in\n{}", outcome.told())),
    }
}

const TCSETS2: u32 = 0x402c_542b;
const TIOCSTI: u32 = 0x5412;

/// Dumps with an ioctl that fails, or, without an errno, kills the command.
fn dump_without(
    scene: &Scene,
    ioctl: u32,
    errno: Option<i32>,
    pid: i32,
    more: &[&str],
) -> Result<Outcome, String> {
    let program = freezeframe_tests::run::program_binary();
    let program = program.to_string_lossy();
    let (ioctl, errno) = (ioctl.to_string(), errno.map(|n| n.to_string()));
    match errno {
        Some(errno) => {
            let by = [&program, "exec", "--fail-ioctl", &ioctl, &errno];
            scene.dump_through(&by, pid, more)
        }
        None => {
            let by = [&program, "exec", "--die-at-ioctl", &ioctl];
            scene.dump_through(&by, pid, more)
        }
    }
}

/// What waits in a terminal can be put back only with CAP_SYS_ADMIN.
fn without_the_capability(name: &str, refusal: Option<&str>) -> Done {
    own_terminals()?;
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program(name)?;
    let by = ["/usr/bin/setpriv", "--bounding-set", "-sys_admin"];
    let outcome = scene.dump_through(&by, target.pid, &["-R"])?;
    match refusal {
        Some(what) => {
            let outcome = outcome.must_exit(1)?;
            let words = format!("{what} cannot be put back without CAP_SYS_ADMIN");
            must_say(&outcome, &words)?;
        }
        None => drop(outcome.must_exit(0)?),
    }
    scene.finish(target, &program, &before, Mode::Running)
}

#[test]
fn what_waits_is_refused_without_the_capability() -> Done {
    let input = Some("input that waits in a terminal (tty)");
    let output = Some("output that waits in a terminal (tty)");
    for (name, refusal) in [
        ("terminals::input_lines", input),
        ("terminals::input_raw", input),
        ("terminals::input_full", input),
        ("terminals::output", output),
        ("terminals::output_full", output),
        ("terminals::stopped_char", output),
        ("terminals::pair", None),
        ("terminals::settings", None),
        ("terminals::input_typed", None),
        ("terminals::never_opened", None),
    ] {
        without_the_capability(name, refusal).map_err(|e| format!("{name}: {e}"))?;
    }
    Ok(())
}

#[test]
fn what_waits_is_not_touched_where_the_dump_is_refused() -> Done {
    own_terminals()?;
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("terminals::waits_refused")?;
    let outcome = dump_without(&scene, TIOCSTI, None, target.pid, &[])?;
    must_say(&outcome.must_exit(1)?, "locked settings")?;
    scene.finish(target, &program, &before, Mode::Restore)
}

#[test]
fn what_was_taken_is_put_back_after_an_error() -> Done {
    own_terminals()?;
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("terminals::stopped_char")?;
    let outcome = dump_without(&scene, TCSETS2, Some(libc::EPERM), target.pid, &[])?;
    must_say(&outcome.must_exit(1)?, "ioctl(TCSETS2)")?;
    scene.finish(target, &program, &before, Mode::Restore)
}

/// The one moment in which a kill harms a target (see ARCHITECTURE.md): what the
/// command has in its hands is lost, all else is there, and the target goes on.
#[test]
fn killed_with_what_waited_in_its_hands() -> Done {
    own_terminals()?;
    let scene = Scene::new()?;
    let script = "if True:
        import fcntl, os, struct, sys, termios, time
        os.chdir(sys.argv[1])
        master, slave = os.openpty()
        quiet = termios.tcgetattr(slave)
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, quiet)
        was = termios.tcgetattr(slave)
        for fd in (master, slave): os.set_blocking(fd, False)
        def waits(fd):
            return struct.unpack('i', fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
        def read(fd):
            try: return os.read(fd, 99).decode()
            except BlockingIOError: return 'nothing'
        os.write(master, b'typed\\n')
        while waits(slave) < 6: time.sleep(0.001)
        for turn in ('first', 'second'):
            if turn == 'first': os.write(slave, b'told')
            open(turn, 'x')
            while not os.path.exists('after-' + turn): time.sleep(0.001)
            there = (read(master), termios.tcgetattr(slave) == was)
            if turn == 'second': there += (read(slave),)
            with open('part', 'w') as file: file.write(repr(there))
            os.rename('part', 'there-' + turn)
        ";
    let dir = scene.dir_text();
    let target = scene.start_other(&[PYTHON, "-c", script, &dir])?;
    for (turn, there) in [
        // Output is taken first, and input is not touched yet.
        ("first", "('nothing', True)"),
        ("second", "('nothing', False, 'nothing')"),
    ] {
        scene.await_file(turn, &target)?;
        let outcome = dump_without(&scene, TIOCSTI, None, target.pid, &["-R"])?;
        must_say(&outcome.must_exit(3)?, "target=unknown")?;
        write(&scene, &format!("after-{turn}"), "")?;
        let answer = format!("there-{turn}");
        scene.await_file(&answer, &target)?;
        same(turn, text(&scene, &answer).as_str(), there)?;
    }
    scene.await_exit(&target)?;
    scene.nothing_left()
}

/// A mount of devpts that goes with it.
struct OtherTerminals(PathBuf);

impl OtherTerminals {
    fn mount(at: PathBuf) -> Result<Self, String> {
        fs::create_dir(&at).map_err(|e| e.to_string())?;
        let kind = Some("devpts");
        let options = Some("newinstance,ptmxmode=0666");
        nix::mount::mount(kind, &at, kind, nix::mount::MsFlags::empty(), options)
            .map_err(|e| e.to_string())?;
        Ok(OtherTerminals(at))
    }
}

impl Drop for OtherTerminals {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn another_devpts_is_refused() -> Done {
    own_terminals()?;
    let scene = Scene::new()?;
    let _mounted = OtherTerminals::mount(scene.path("pts"))?;
    let script = "if True:
        import fcntl, os, sys, time
        os.chdir(sys.argv[1])
        master = os.open('pts/ptmx', os.O_RDWR | os.O_NOCTTY)
        if sys.argv[2] == 'open':
            fcntl.ioctl(master, 0x40045431, bytes(4))
            slave = os.open('pts/0', os.O_RDWR | os.O_NOCTTY)
        open('ready', 'x')
        while not os.path.exists('over'): time.sleep(0.001)
        ";
    let dir = scene.dir_text();
    for (number_is_taken, slave, words) in [
        (
            false,
            "open",
            "of another devpts, where /dev/pts/0 is not its slave",
        ),
        (true, "open", "of another devpts than that of /dev/pts/0"),
        (true, "never", "of another devpts than that of /dev/pts/0"),
    ] {
        let taker = number_is_taken.then(|| nix::pty::openpty(None, None).unwrap());
        let target = scene.start_other(&[PYTHON, "-c", script, &dir, slave])?;
        scene.await_file("ready", &target)?;
        let outcome = scene.dump_pid(target.pid, "refused", &[])?.must_exit(1)?;
        must_say(&outcome, words)?;
        write(&scene, "over", "")?;
        scene.await_exit(&target)?;
        scene.nothing_left()?;
        for name in ["ready", "over"] {
            fs::remove_file(scene.path(name)).map_err(|e| e.to_string())?;
        }
        drop(taker);
    }
    Ok(())
}

/// A session on a terminal of ours: given again by the caller.
#[test]
fn an_external_controlling_terminal() -> Done {
    use std::os::unix::fs::MetadataExt;
    own_terminals()?;
    let scene = Scene::new()?;
    let first = nix::pty::openpty(None, None).map_err(|e| e.to_string())?;
    let node = fs::metadata("/dev/pts/0").map_err(|e| e.to_string())?;
    let job = "exec < /dev/pts/0 > /dev/pts/0; echo ready; read line; echo \"got $line\" > \"$0/got\"; read l < /dev/tty; echo \"and $l\" >> \"$0/got\"";
    let dir = scene.dir_text();
    let target = scene.start_other(&["/bin/sh", "-c", job, &dir])?;
    let shown = |fd: &std::os::fd::OwnedFd| {
        let mut bytes = [0u8; 64];
        let n = nix::unistd::read(fd, &mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..n]).into_owned()
    };
    if !shown(&first.master).contains("ready") {
        return Err("it did not start".to_owned());
    }
    let refused = scene.dump_pid(target.pid, "refused", &[])?.must_exit(1)?;
    if !refused.stderr.contains("is outside the tree") {
        return Err(refused.told());
    }
    let name = format!("tty[{:x}:{:x}]", node.rdev(), node.dev());
    let before = Snapshot::take(target.pid);
    scene
        .dump_pid(target.pid, "img", &["--external", &name])?
        .must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let second = nix::pty::openpty(None, None).map_err(|e| e.to_string())?;
    let given = format!("fd[{}]:{name}", second.slave.as_raw_fd());
    let (target, _) = scene.restore_pid(target.pid, "img", &["--inherit-fd", &given])?;
    nix::unistd::write(&second.master, b"one\ntwo\n").map_err(|e| e.to_string())?;
    scene.await_exit(&target)?;
    scene.nothing_left()?;
    let got = fs::read_to_string(scene.path("got")).unwrap_or_default();
    match got.as_str() {
        "got one\nand two\n" => Ok(()),
        _ => Err(format!("it read {got:?}")),
    }
}

fn name_of_external(path: &str) -> Result<String, String> {
    use std::os::unix::fs::MetadataExt;
    let node = fs::metadata(path).map_err(|e| e.to_string())?;
    Ok(format!("tty[{:x}:{:x}]", node.rdev(), node.dev()))
}

#[test]
fn the_foreground_of_an_external_terminal() -> Done {
    own_terminals()?;
    let scene = Scene::new()?;
    let script = "if True:
        import os, signal, sys, time
        os.chdir(sys.argv[1])
        terminal = os.open('/dev/pts/0', os.O_RDWR)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        job = os.fork()
        if job == 0:
            os.setpgid(0, 0)
            os.tcsetpgrp(terminal, os.getpid())
            open('ready', 'x')
            while not os.path.exists('go'): time.sleep(0.001)
            with open('front', 'w') as file: file.write(str(os.tcgetpgrp(terminal) == os.getpid()))
            os._exit(0)
        os.waitpid(job, 0)
        ";
    let first = nix::pty::openpty(None, None).map_err(|e| e.to_string())?;
    let dir = scene.dir_text();
    let target = scene.start_other(&[PYTHON, "-c", script, &dir])?;
    scene.await_file("ready", &target)?;
    let name = name_of_external("/dev/pts/0")?;
    let before = Snapshot::take(target.pid);
    scene
        .dump_pid(target.pid, "img", &["--external", &name])?
        .must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let second = nix::pty::openpty(None, None).map_err(|e| e.to_string())?;
    let given = format!("fd[{}]:{name}", second.slave.as_raw_fd());
    let (target, _) = scene.restore_pid(target.pid, "img", &["--inherit-fd", &given])?;
    write(&scene, "go", "")?;
    scene.await_exit(&target)?;
    drop(first);
    same("in front", text(&scene, "front").as_str(), "True")?;
    scene.nothing_left()
}

/// A session has its terminal until it ends: it is not taken for a restored one.
#[test]
fn the_terminal_of_another_session_is_not_taken() -> Done {
    own_terminals()?;
    let scene = Scene::new()?;
    let dir = scene.dir_text();
    let start = |n: i32| {
        let job = format!("exec 3<> /dev/pts/{n}; echo > \"$0/ready{n}\"; read line <&3");
        let target = scene.start_other(&["/bin/sh", "-c", &job, &dir])?;
        scene.await_file(&format!("ready{n}"), &target)?;
        Ok::<Target, String>(target)
    };
    let first = nix::pty::openpty(None, None).map_err(|e| e.to_string())?;
    let target = start(0)?;
    let name = name_of_external("/dev/pts/0")?;
    let before = Snapshot::take(target.pid);
    scene
        .dump_pid(target.pid, "img", &["--external", &name])?
        .must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let second = nix::pty::openpty(None, None).map_err(|e| e.to_string())?;
    let other = start(1)?;
    let given = format!("fd[{}]:{name}", second.slave.as_raw_fd());
    let Err(told) = scene.restore_pid(target.pid, "img", &["--inherit-fd", &given]) else {
        return Err("it took the terminal of another session".to_owned());
    };
    if !told.contains("is the controlling terminal of another session") {
        return Err(told);
    }
    nix::unistd::write(&second.master, b"line\n").map_err(|e| e.to_string())?;
    scene.await_exit(&other)?;
    // It has ended, so its terminal is nobody's.
    let (target, _) = scene.restore_pid(target.pid, "img", &["--inherit-fd", &given])?;
    nix::unistd::write(&second.master, b"line\n").map_err(|e| e.to_string())?;
    scene.await_exit(&target)?;
    drop(first);
    scene.nothing_left()
}

#[test]
fn tmux_with_a_shell_in_a_loop() -> Done {
    const TMUX: &str = "/usr/bin/tmux";
    if !Path::new(TMUX).exists() {
        return Err("tmux is missing: see scripts/test".to_owned());
    }
    own_terminals()?;
    let scene = Scene::new()?;
    let (dir, socket) = (scene.dir_text(), scene.path("socket"));
    let socket = socket.to_string_lossy().into_owned();
    let server = scene.start_other(&[TMUX, "-S", &socket, "-f", "/dev/null", "-D"])?;
    scene.await_file("socket", &server)?;
    let tmux = |words: &[&str]| -> Result<String, String> {
        let mut command = Command::new(TMUX);
        command
            .args(["-S", &socket])
            .args(words)
            .env("TERM", "vt100");
        let output = command.output().map_err(|e| e.to_string())?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(format!("tmux {words:?}: {told}")),
        }
    };
    let job = format!(
        "n=0; while [ ! -e {dir}/stop ]; do echo tick $n; n=$((n+1)); sleep 0.02; done; exec cat"
    );
    let size = ["-x", "80", "-y", "24"];
    tmux(
        &[
            &["new-session", "-d", "-s", "one"],
            &size[..],
            &["/bin/sh", "-c", &job],
        ]
        .concat(),
    )?;
    let last = || -> Result<i64, String> {
        let shown = tmux(&["capture-pane", "-p", "-t", "one"])?;
        let numbers = shown.lines().filter_map(|l| l.strip_prefix("tick "));
        Ok(numbers.filter_map(|n| n.parse().ok()).max().unwrap_or(-1))
    };
    scene.await_that("ticks", || Ok(last()? > 5), Some(&server))?;
    let was = last()?;
    scene
        .dump_pid(server.pid, "live", &["--leave-running"])?
        .must_exit(0)?;
    scene.await_that("more ticks", || Ok(last()? > was + 5), Some(&server))?;
    let was = last()?;
    let before = Snapshot::take(server.pid);
    scene.dump_pid(server.pid, "img", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let (server, _) = scene.restore_pid(server.pid, "img", &[])?;
    scene.await_that("ticks after it", || Ok(last()? > was + 5), Some(&server))?;
    fs::write(scene.path("stop"), "").map_err(|e| e.to_string())?;
    tmux(&["send-keys", "-t", "one", "typed on", "Enter"])?;
    let twice = || {
        let shown = tmux(&["capture-pane", "-p", "-t", "one"])?;
        Ok(shown.matches("typed on").count() == 2)
    };
    scene.await_that("what was typed, and its copy", twice, Some(&server))?;
    let before = Snapshot::take(server.pid);
    tmux(&["kill-server"])?;
    scene.await_exit(&server)?;
    scene.await_gone(&before, DEADLINE)?;
    scene.nothing_left()
}
