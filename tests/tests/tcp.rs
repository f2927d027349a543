//! A TCP connection to somebody outside the tree, who sees nothing of a dump and a restore, whatever becomes of the tool.
//!
//! The target is cat(1), which sends back what it gets; each test has a network of its own.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{DEADLINE, Scene, Target, own_network, program_binary, rules};
use freezeframe_tests::snapshot::{Snapshot, children, state_of};
use freezeframe_tests::tool::{Outcome, binary};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ESTABLISHED: &str = "--tcp-established";

struct Echo {
    scene: Scene,
    target: Target,
    peer: TcpStream,
    said: u32,
}

impl Echo {
    fn start(stderr: Stdio) -> Echo {
        own_network().unwrap();
        let scene = Scene::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let end = OwnedFd::from(listener.accept().unwrap().0);
        let mut command = Command::new(program_binary());
        command
            .args(["exec", "/bin/cat"])
            .stdin(end.try_clone().unwrap())
            .stdout(end)
            .stderr(stderr)
            .current_dir("/");
        let pid = command.spawn().unwrap().id() as i32;
        peer.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut echo = Echo {
            scene,
            target: Target { pid },
            peer,
            said: 0,
        };
        echo.answers();
        echo
    }

    fn say(&mut self) -> String {
        self.said += 1;
        let line = format!("line {}\n", self.said);
        self.peer.write_all(line.as_bytes()).unwrap();
        line
    }

    fn hears(&mut self, line: &str) {
        let mut got = vec![0; line.len()];
        self.peer
            .read_exact(&mut got)
            .unwrap_or_else(|e| panic!("no answer to {line:?}: {e}; rules {:?}", rules()));
        assert_eq!(String::from_utf8_lossy(&got), line);
    }

    fn answers(&mut self) {
        let line = self.say();
        self.hears(&line);
    }

    fn dump(&self, images: &str, more: &[&str]) -> Outcome {
        self.scene.dump_pid(self.target.pid, images, more).unwrap()
    }

    fn end(&self, images: &str) {
        let before = Snapshot::take(self.target.pid);
        self.dump(images, &[ESTABLISHED]).must_exit(0).unwrap();
        self.scene.await_gone(&before, DEADLINE).unwrap();
    }

    fn restore(&self, images: &str) {
        self.scene
            .restore_pid(self.target.pid, images, &[ESTABLISHED])
            .unwrap();
    }

    /// The peer has the last word.
    fn finish(mut self) {
        self.answers();
        assert_eq!(rules().unwrap(), Vec::<String>::new());
        self.peer.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(self.peer.read(&mut [0; 1]).unwrap(), 0);
        self.scene.await_exit(&self.target).unwrap();
        self.await_alone();
    }

    /// Waits until nothing is below us but the target: what the tool has left comes to us, forks of a live dump too.
    fn await_alone(&self) {
        let alone = || -> Result<bool, String> {
            let mut left = children(std::process::id() as i32);
            left.retain(|pid| *pid != self.target.pid);
            for pid in &left {
                let _ = waitpid(Pid::from_raw(*pid), Some(WaitPidFlag::WNOHANG));
            }
            Ok(left.is_empty())
        };
        self.scene
            .await_that("the rest's end", alone, None)
            .unwrap();
    }

    /// Whether the target is no more, reaping it if it is ours.
    fn is_gone(&self) -> bool {
        let pid = Pid::from_raw(self.target.pid);
        let reaped = waitpid(pid, Some(WaitPidFlag::WNOHANG));
        !matches!(reaped, Ok(WaitStatus::StillAlive)) && state_of(pid.as_raw()).is_none()
    }

    /// Starts the command, kills its visible process, the engine's, or both after a time, and waits until both are gone.
    fn run_and_kill(&self, args: &[&str], who: usize, after: Duration) {
        let mut tool = Command::new(binary())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while start.elapsed() < after && !matches!(tool.try_wait(), Ok(Some(_))) {
            std::hint::spin_loop();
        }
        let visible = tool.id() as i32;
        let mut doomed = Vec::new();
        let ended = matches!(tool.try_wait(), Ok(Some(_)));
        if who != VISIBLE && !ended {
            doomed.extend(
                children(visible)
                    .into_iter()
                    .filter(|pid| *pid != self.target.pid),
            );
        }
        if who != ENGINE && !ended {
            doomed.push(visible);
        }
        for pid in doomed {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        tool.wait().unwrap();
        self.await_alone();
    }

    /// Whether the target answers `line`; if not, it has died.
    fn lives(&mut self, line: &str) -> bool {
        self.peer.set_nonblocking(true).unwrap();
        let until = Instant::now() + DEADLINE;
        let mut got = Vec::new();
        let lives = loop {
            let mut buf = [0; 100];
            match self.peer.read(&mut buf) {
                Ok(0) => panic!(
                    "the peer saw the end of the connection; rules {:?}",
                    rules()
                ),
                Ok(n) => got.extend_from_slice(&buf[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => panic!("the peer saw: {e}; rules {:?}", rules()),
            }
            if got.len() >= line.len() {
                assert_eq!(String::from_utf8_lossy(&got), line);
                break true;
            }
            if self.is_gone() {
                assert!(got.is_empty());
                break false;
            }
            assert!(
                Instant::now() < until,
                "neither dead nor alive; rules {:?}",
                rules()
            );
            std::thread::sleep(Duration::from_millis(1));
        };
        self.peer.set_nonblocking(false).unwrap();
        lives
    }
}

const VISIBLE: usize = 0;
const ENGINE: usize = 1;

#[test]
fn a_dump_that_leaves_it_running_leaves_the_connection_as_it_was() {
    let mut echo = Echo::start(Stdio::null());
    for (images, way) in [("img0", "--leave-running"), ("img1", "--live")] {
        echo.dump(images, &[ESTABLISHED, way]).must_exit(0).unwrap();
        assert_eq!(rules().unwrap(), Vec::<String>::new());
        echo.answers();
    }
    echo.finish();
}

#[test]
fn a_refused_dump_leaves_the_connection_as_it_was() {
    let mut ghost = tempfile::tempfile().unwrap();
    ghost.write_all(b"no name").unwrap();
    let mut echo = Echo::start(ghost.into());
    for more in [&[ESTABLISHED, "--ghost-limit", "1"][..], &[]] {
        let refused = echo.dump("img", more).must_exit(1).unwrap();
        let why = ["ghost-limit", ESTABLISHED][usize::from(more.is_empty())];
        assert!(refused.stderr.contains(why), "{}", refused.told());
        assert_eq!(rules().unwrap(), Vec::<String>::new());
        echo.answers();
    }
    echo.finish();
}

#[test]
fn the_peer_of_a_connection_sees_nothing() {
    let mut echo = Echo::start(Stdio::null());
    for images in ["img0", "img1"] {
        echo.end(images);
        let held = rules().unwrap();
        assert!(
            held.len() == 1 && held[0].starts_with("freezeframe-"),
            "{held:?}"
        );
        // Said to nobody: it comes when somebody is there.
        let line = echo.say();
        let dir = echo.scene.path(images).to_string_lossy().into_owned();
        let refused =
            freezeframe_tests::tool::freezeframe(&["restore", "-D", &dir, "-d"], DEADLINE);
        let refused = refused.unwrap().must_exit(2).unwrap();
        assert!(refused.stderr.contains(ESTABLISHED), "{}", refused.told());
        assert_eq!(rules().unwrap(), held);
        echo.restore(images);
        assert_eq!(rules().unwrap(), Vec::<String>::new());
        echo.hears(&line);
    }
    echo.finish();
}

#[test]
fn a_connection_without_its_option_ends() {
    let mut echo = Echo::start(Stdio::null());
    let before = Snapshot::take(echo.target.pid);
    echo.dump("img", &["--tcp-close"]).must_exit(0).unwrap();
    echo.scene.await_gone(&before, DEADLINE).unwrap();
    assert_eq!(rules().unwrap(), Vec::<String>::new());
    assert_eq!(echo.peer.read(&mut [0; 1]).unwrap(), 0);
    let dir = &["--tcp-close"];
    echo.scene.restore_pid(echo.target.pid, "img", dir).unwrap();
    // cat reads the end of a closed connection, and leaves.
    echo.scene.await_exit(&echo.target).unwrap();
    echo.scene.nothing_left().unwrap();
}

#[test]
fn whenever_the_tool_is_killed_no_rule_stays_and_the_peer_sees_nothing() {
    const ROUNDS: u32 = 45;
    let mut echo = Echo::start(Stdio::null());
    let pid = echo.target.pid.to_string();
    let start = Instant::now();
    echo.end("first");
    let dumping = start.elapsed();
    let start = Instant::now();
    echo.restore("first");
    let restoring = start.elapsed();
    let (mut lived, mut died, mut again) = (0, 0, 0);
    for round in 0..ROUNDS {
        let images = format!("img{round}");
        let dir = echo.scene.path(&images).to_string_lossy().into_owned();
        let args = ["dump", "-t", &pid, "-D", &dir, "--no-sync", ESTABLISHED];
        // Every third, a little later each time: beyond its end at the last, whatever it takes by then.
        let after = match round / 3 {
            last if last + 1 == ROUNDS / 3 => DEADLINE,
            later => dumping * later / (ROUNDS / 4),
        };
        echo.run_and_kill(&args, round as usize % 3, after);
        let line = echo.say();
        if echo.lives(&line) {
            assert_eq!(rules().unwrap(), Vec::<String>::new(), "round {round}");
            lived += 1;
            continue;
        }
        died += 1;
        assert!(fs::metadata(echo.scene.path(&images).join("freezeframe.img")).is_ok());
        // The restore is killed too, where people can: its visible process. (See ARCHITECTURE.md of its very end.)
        let args = ["restore", "-D", &dir, "-d", ESTABLISHED];
        echo.run_and_kill(&args, VISIBLE, restoring * (died % 8) / 8);
        if echo.is_gone() {
            again += 1;
            echo.restore(&images);
        }
        assert_eq!(rules().unwrap(), Vec::<String>::new(), "round {round}");
        echo.hears(&line);
        fs::remove_dir_all(&dir).unwrap();
    }
    assert!(lived > 0 && died > 0, "{lived} lived, {died} died");
    eprintln!("{lived} lived, {died} died, {again} were restored twice");
    echo.finish();
}
