//! Real programs on terminals: what was typed before a dump is there after the restore, and they are typed on.
//!
//! `real/terminal.py` runs each on a pseudo-terminal that belongs to the tree. What a test types it appends to a file,
//! and what the program shows it finds in another.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{DEADLINE, Scene, Target, own_terminals};
use freezeframe_tests::snapshot::Snapshot;
use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;

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
