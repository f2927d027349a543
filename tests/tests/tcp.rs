//! A TCP connection to somebody outside the tree, who sees nothing of a dump and a restore, whatever becomes of the tool.
//!
//! The target is cat(1), which sends back what it gets; each test has a network of its own.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_sys::{pidfd, tcp};
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

/// A dump that ends the target.
fn end(scene: &Scene, target: &Target, images: &str) {
    let before = Snapshot::take(target.pid);
    let done = scene.dump_pid(target.pid, images, &[ESTABLISHED]);
    done.unwrap().must_exit(0).unwrap();
    scene.await_gone(&before, DEADLINE).unwrap();
}

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
        end(&self.scene, &self.target, images);
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
        await_alone(&self.scene, &self.target);
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
            if is_gone(&self.target) {
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

/// Waits until nothing is below us but the target: what the tool has left comes to us, forks of a live dump too.
fn await_alone(scene: &Scene, target: &Target) {
    let alone = || -> Result<bool, String> {
        let mut left = children(std::process::id() as i32);
        left.retain(|pid| *pid != target.pid);
        for pid in &left {
            let _ = waitpid(Pid::from_raw(*pid), Some(WaitPidFlag::WNOHANG));
        }
        Ok(left.is_empty())
    };
    scene.await_that("the rest's end", alone, None).unwrap();
}

/// Whether the target is no more, reaping it if it is ours.
fn is_gone(target: &Target) -> bool {
    let pid = Pid::from_raw(target.pid);
    let reaped = waitpid(pid, Some(WaitPidFlag::WNOHANG));
    !matches!(reaped, Ok(WaitStatus::StillAlive)) && state_of(pid.as_raw()).is_none()
}

/// Starts the command, kills its visible process, the engine's, or both after a time, if it has not ended, and waits
/// until both are gone.
fn run_and_kill((scene, target): (&Scene, &Target), args: &[&str], who: usize, after: Duration) {
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
                .filter(|pid| *pid != target.pid),
        );
    }
    if who != ENGINE && !ended {
        doomed.push(visible);
    }
    for pid in doomed {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    tool.wait().unwrap();
    await_alone(scene, target);
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
        let ours = (&echo.scene, &echo.target);
        run_and_kill(ours, &args, round as usize % 3, after);
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
        run_and_kill(
            (&echo.scene, &echo.target),
            &args,
            VISIBLE,
            restoring * (died % 8) / 8,
        );
        if is_gone(&echo.target) {
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

/// A process that listens, and peers outside that it has not accepted.
struct Waiting {
    scene: Scene,
    target: Target,
    peers: Vec<TcpStream>,
}

impl Waiting {
    fn start() -> Waiting {
        own_network().unwrap();
        let scene = Scene::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut command = Command::new(program_binary());
        command
            .args(["exec", "/bin/sleep", "1000"])
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/");
        let pid = command.spawn().unwrap().id() as i32;
        let target = Target { pid };
        scene.await_program(pid, "sleep").unwrap();
        let mut waiting = Waiting {
            scene,
            target,
            peers: Vec::new(),
        };
        waiting.connect();
        waiting
    }

    /// The target's listening socket.
    fn listener(&self) -> TcpListener {
        let pidfd = pidfd::pidfd_open(freezeframe_sys::ids::Pid(self.target.pid)).unwrap();
        TcpListener::from(pidfd::pidfd_getfd(&pidfd, 0).unwrap())
    }

    /// Two more connect, of which one says something at once.
    fn connect(&mut self) {
        let to = self.listener().local_addr().unwrap();
        let before = self.waiting();
        for said in [&b""[..], b"at once "] {
            let mut peer = TcpStream::connect(to).unwrap();
            peer.write_all(said).unwrap();
            peer.set_read_timeout(Some(DEADLINE)).unwrap();
            self.peers.push(peer);
        }
        let there = || Ok(self.waiting() == before + 2);
        self.scene.await_that("connections", there, None).unwrap();
    }

    fn waiting(&self) -> u32 {
        tcp::info(self.listener()).unwrap().waiting
    }

    /// All are accepted and talk, in their order.
    fn serve(&mut self) {
        let listener = self.listener();
        assert_eq!(self.waiting() as usize, self.peers.len());
        for (n, mut peer) in self.peers.drain(..).enumerate() {
            let (mut end, from) = listener.accept().unwrap();
            assert_eq!(from, peer.local_addr().unwrap());
            end.set_read_timeout(Some(DEADLINE)).unwrap();
            peer.write_all(b"later").unwrap();
            let words = [&b"later"[..], b"at once later"][n % 2];
            let mut got = vec![0; words.len()];
            end.read_exact(&mut got).unwrap();
            assert_eq!(got, words);
            end.write_all(b"answer").unwrap();
            let mut got = [0; 6];
            peer.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"answer");
        }
        assert_eq!(rules().unwrap(), Vec::<String>::new());
    }

    fn dump(&self, images: &str, more: &[&str]) -> Outcome {
        self.scene.dump_pid(self.target.pid, images, more).unwrap()
    }

    fn end(&self, images: &str) {
        end(&self.scene, &self.target, images);
    }

    fn restore(&self, images: &str) -> Outcome {
        let restored = self
            .scene
            .restore_pid(self.target.pid, images, &[ESTABLISHED]);
        restored.unwrap().1
    }
}

#[test]
fn peers_that_wait_to_be_accepted_see_nothing() {
    let mut waiting = Waiting::start();
    for images in ["img0", "img1"] {
        waiting.end(images);
        assert_eq!(rules().unwrap().len(), 1);
        waiting.scene.verify(images).unwrap();
        let dir = waiting.scene.path(images).to_string_lossy().into_owned();
        let refused =
            freezeframe_tests::tool::freezeframe(&["restore", "-D", &dir, "-d"], DEADLINE);
        let refused = refused.unwrap().must_exit(2).unwrap();
        assert!(refused.stderr.contains(ESTABLISHED), "{}", refused.told());
        waiting.restore(images);
        assert_eq!(rules().unwrap(), Vec::<String>::new());
        waiting.connect();
    }
    waiting.serve();
}

#[test]
fn peers_that_wait_are_left_alone_where_the_tree_runs_on() {
    let mut waiting = Waiting::start();
    for (images, way) in [("img0", "--leave-running"), ("img1", "--live")] {
        let refused = waiting.dump(images, &[ESTABLISHED, way]).must_exit(1);
        let refused = refused.unwrap();
        assert!(refused.stderr.contains("runs on"), "{}", refused.told());
        let left_out = [ESTABLISHED, way, "--skip-in-flight"];
        waiting.dump(images, &left_out).must_exit(0).unwrap();
    }
    waiting.serve();
}

#[test]
fn peers_that_wait_and_are_left_out_are_reset() {
    let mut waiting = Waiting::start();
    let before = Snapshot::take(waiting.target.pid);
    let more = [ESTABLISHED, "--skip-in-flight"];
    waiting.dump("img", &more).must_exit(0).unwrap();
    waiting.scene.await_gone(&before, DEADLINE).unwrap();
    assert_eq!(rules().unwrap(), Vec::<String>::new());
    for peer in &mut waiting.peers {
        let end = peer.read(&mut [0; 1]).map_err(|e| e.kind());
        assert_eq!(end, Err(ErrorKind::ConnectionReset));
    }
    waiting.peers.clear();
    waiting.restore("img");
    waiting.connect();
    waiting.serve();
}

#[test]
fn whenever_a_dump_is_killed_those_that_wait_are_in_the_tree_or_in_its_image() {
    const ROUNDS: u32 = 16;
    let mut waiting = Waiting::start();
    let pid = waiting.target.pid.to_string();
    let start = Instant::now();
    waiting.end("first");
    let dumping = start.elapsed();
    waiting.restore("first");
    let (mut lived, mut died, mut lost) = (0, 0, 0);
    for round in 0..ROUNDS {
        let images = format!("img{round}");
        let dir = waiting.scene.path(&images);
        fs::create_dir_all(&dir).unwrap();
        let dir = dir.to_string_lossy().into_owned();
        let args = ["dump", "-t", &pid, "-D", &dir, "--no-sync", ESTABLISHED];
        let who = round as usize % 2;
        // The last comes to its end, however long that takes.
        let after = match round + 1 {
            ROUNDS => DEADLINE,
            _ => dumping * (round / 2) / (ROUNDS / 3),
        };
        run_and_kill((&waiting.scene, &waiting.target), &args, who, after);
        if state_of(waiting.target.pid).is_some() && !is_gone(&waiting.target) {
            assert_eq!(waiting.waiting() as usize, waiting.peers.len());
            assert_eq!(rules().unwrap(), Vec::<String>::new(), "round {round}");
            lived += 1;
            continue;
        }
        died += 1;
        let restored = waiting.restore(&images);
        if waiting.waiting() == 0 && who == ENGINE {
            // Killed between the end of the tree and the end of the dump.
            let told = restored.stderr.contains("not in the image");
            assert!(told, "{}", restored.told());
            lost += 1;
            waiting.peers.clear();
            waiting.connect();
        }
        waiting.serve();
        waiting.connect();
        fs::remove_dir_all(&dir).unwrap();
    }
    assert!(died > lost, "{lived} lived, {died} died, {lost} lost");
    eprintln!("{lived} lived, {died} died, {lost} had lost them");
    waiting.serve();
}
