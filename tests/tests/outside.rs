//! Pipes and sockets whose other end is outside the tree: given again on restore, or closed.
//!
//! The target is cat(1), from one descriptor of the test to another.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{DEADLINE, Scene, Target, program_binary};
use freezeframe_tests::snapshot::Snapshot;
use freezeframe_tests::tool::{Outcome, freezeframe};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket, socketpair,
};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};

/// Descriptors that the command inherits, so not close-on-exec.
fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe().unwrap()
}

fn inode(fd: impl AsFd) -> u64 {
    let fd = fd.as_fd().try_clone_to_owned().unwrap();
    File::from(fd).metadata().unwrap().ino()
}

fn cat(scene: &Scene, from: OwnedFd, to: OwnedFd) -> Child {
    let mut command = Command::new(program_binary());
    command
        .args(["exec", "/bin/cat"])
        .stdin(from)
        .stdout(to)
        .stderr(Stdio::null());
    let child = command.current_dir("/").spawn().unwrap();
    scene.await_program(child.id() as i32, "cat").unwrap();
    child
}

/// Dumps it, and sees it gone.
fn dump(scene: &Scene, child: &mut Child, more: &[&str]) -> Outcome {
    let pid = child.id() as i32;
    let before = Snapshot::take(pid);
    let outcome = scene
        .dump_pid(pid, "img", more)
        .unwrap()
        .must_exit(0)
        .unwrap();
    child.wait().unwrap();
    scene.await_gone(&before, DEADLINE).unwrap();
    outcome
}

fn given(fd: &OwnedFd, name: &str) -> String {
    format!("fd[{}]:{name}", fd.as_raw_fd())
}

fn take(from: &mut File, len: usize) -> String {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn pipes_are_given_again_and_what_waited_in_them_comes_first() {
    let scene = Scene::new().unwrap();
    let ((from, input), (output, to)) = (pipe(), pipe());
    let names = [&from, &to].map(|fd| format!("pipe:[{}]", inode(fd)));
    let mut child = cat(&scene, from, to);
    let (mut input, mut output) = (File::from(input), File::from(output));
    input.write_all(b"one").unwrap();
    assert_eq!(take(&mut output, 3), "one");
    let target = Target {
        pid: child.id() as i32,
    };
    kill(Pid::from_raw(target.pid), Signal::SIGSTOP).unwrap();
    scene.await_state(&target, 'T').unwrap();
    input.write_all(b"two").unwrap();
    let outcome = dump(&scene, &mut child, &[]);
    assert!(
        outcome.stderr.contains(&names[0]),
        "no warning: {}",
        outcome.stderr
    );

    let ((from, input), (output, to)) = (pipe(), pipe());
    let words = [given(&from, &names[0]), given(&to, &names[1])];
    let more = ["--inherit-fd", &words[0], "--inherit-fd", &words[1]];
    let (target, _) = scene.restore_pid(target.pid, "img", &more).unwrap();
    drop((from, to));
    let (mut input, mut output) = (File::from(input), File::from(output));
    kill(Pid::from_raw(target.pid), Signal::SIGCONT).unwrap();
    assert_eq!(take(&mut output, 3), "two");
    input.write_all(b"three").unwrap();
    assert_eq!(take(&mut output, 5), "three");
    drop(input);
    assert_eq!(output.read(&mut [0; 9]).unwrap(), 0);
    scene.await_exit(&target).unwrap();
    scene.nothing_left().unwrap();
}

#[test]
fn without_a_word_the_other_end_is_closed() {
    let scene = Scene::new().unwrap();
    let ((from, input), (output, to)) = (pipe(), pipe());
    let mut child = cat(&scene, from, to);
    let (mut input, mut output) = (File::from(input), File::from(output));
    input.write_all(b"one").unwrap();
    assert_eq!(take(&mut output, 3), "one");
    let pid = child.id() as i32;
    dump(&scene, &mut child, &[]);
    drop((input, output));
    // Its input has no writer: it reads the end, and leaves.
    let (target, _) = scene.restore_pid(pid, "img", &[]).unwrap();
    scene.await_exit(&target).unwrap();
    scene.nothing_left().unwrap();
}

#[test]
fn what_was_dumped_as_external_has_to_be_given() {
    let scene = Scene::new().unwrap();
    let ((from, input), (output, to)) = (pipe(), pipe());
    let name = format!("pipe:[{}]", inode(&from));
    let mut child = cat(&scene, from, to);
    let outcome = dump(&scene, &mut child, &["--external", &name]);
    assert!(
        !outcome.stderr.contains(&name),
        "a warning: {}",
        outcome.stderr
    );
    drop((input, output));
    let images = scene.path("img");
    let args = ["restore", "-D", &images.to_string_lossy(), "-d"];
    let outcome = freezeframe(&args, DEADLINE).unwrap().must_exit(2).unwrap();
    assert!(
        outcome.stderr.contains("--inherit-fd"),
        "{}",
        outcome.stderr
    );
    assert!(outcome.stderr.contains(&name), "{}", outcome.stderr);
    scene.nothing_left().unwrap();
}

#[test]
fn a_socket_whose_peer_is_outside_is_refused_or_external() {
    let scene = Scene::new().unwrap();
    let pair = || {
        socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::empty(),
        )
        .unwrap()
    };
    let ((from, input), (output, to)) = (pair(), pipe());
    let name = format!("unix[{}]", inode(&from));
    let to_name = format!("pipe:[{}]", inode(&to));
    let mut child = cat(&scene, from, to);
    let (mut input, mut output) = (File::from(input), File::from(output));
    input.write_all(b"one").unwrap();
    assert_eq!(take(&mut output, 3), "one");
    let pid = child.id() as i32;
    let refused = scene
        .dump_pid(pid, "no", &[])
        .unwrap()
        .must_exit(1)
        .unwrap();
    assert!(
        refused.stderr.contains("peer is outside the tree"),
        "{}",
        refused.stderr
    );
    input.write_all(b"two").unwrap();
    assert_eq!(take(&mut output, 3), "two");
    dump(&scene, &mut child, &["--external", &name]);

    let ((from, input), (output, to)) = (pair(), pipe());
    let words = [given(&from, &name), given(&to, &to_name)];
    let more = ["--inherit-fd", &words[0], "--inherit-fd", &words[1]];
    let (target, _) = scene.restore_pid(pid, "img", &more).unwrap();
    drop((from, to));
    let (mut input, mut output) = (File::from(input), File::from(output));
    input.write_all(b"three").unwrap();
    assert_eq!(take(&mut output, 5), "three");
    drop(input);
    scene.await_exit(&target).unwrap();
    scene.nothing_left().unwrap();
}

#[test]
fn a_datagram_socket_connected_to_the_outside_needs_a_word() {
    use std::os::unix::net::UnixDatagram;
    let scene = Scene::new().unwrap();
    let server = UnixDatagram::bind(scene.path("out")).unwrap();
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    let inner = UnixDatagram::bind(scene.path("in")).unwrap();
    inner.connect(scene.path("out")).unwrap();
    let inner = OwnedFd::from(inner);
    let mut child = cat(&scene, inner.try_clone().unwrap(), inner);
    let echo = |text: &str| {
        server.send_to(text.as_bytes(), scene.path("in")).unwrap();
        let mut buffer = [0; 99];
        let n = server.recv(&mut buffer).unwrap();
        assert_eq!(String::from_utf8_lossy(&buffer[..n]), text);
    };
    echo("one");
    let pid = child.id() as i32;
    let refused = scene.dump_pid(pid, "no", &[]).unwrap();
    let refused = refused.must_exit(1).unwrap();
    assert!(
        refused.stderr.contains("without --ext-unix-sk"),
        "{}",
        refused.stderr
    );
    echo("two");
    // Of the sockets with these numbers alone.
    let number = fs::read_link(format!("/proc/{pid}/fd/0")).unwrap();
    let number = number.to_str().unwrap().trim_start_matches("socket:");
    let number = number.trim_matches(['[', ']']).parse::<u64>().unwrap();
    let others = format!("--ext-unix-sk={}", number + 1);
    let refused = scene.dump_pid(pid, "no", &[&others]).unwrap();
    let refused = refused.must_exit(1).unwrap();
    assert!(refused.stderr.contains("without --ext-unix-sk"));
    let its = format!("--ext-unix-sk={},{number}", number + 1);
    dump(&scene, &mut child, &[&its]);
    let (target, _) = scene.restore_pid(pid, "img", &["--ext-unix-sk"]).unwrap();
    echo("three");
    kill(Pid::from_raw(target.pid), Signal::SIGKILL).unwrap();
}

#[test]
fn connections_from_outside_that_wait_are_left_out_on_a_word() {
    let scene = Scene::new().unwrap();
    let new = || {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap()
    };
    let name = UnixAddr::new(&scene.path("s")).unwrap();
    let listener = new();
    bind(listener.as_raw_fd(), &name).unwrap();
    // One may wait.
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let number = inode(&listener);
    let mut command = Command::new(program_binary());
    command
        .args(["exec", "/bin/sleep", "1000"])
        .stdin(listener)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.current_dir("/").spawn().unwrap();
    drop(command);
    scene.await_program(child.id() as i32, "sleep").unwrap();
    let one_may_connect = || {
        let waits = new();
        connect(waits.as_raw_fd(), &name).unwrap();
        let another = connect(new().as_raw_fd(), &name);
        assert_eq!(another, Err(nix::errno::Errno::EAGAIN));
        waits
    };
    let waits = one_may_connect();
    let pid = child.id() as i32;
    let others = format!("--ext-unix-sk={}", number + 1);
    for more in [&[][..], &[&*others]] {
        let refused = scene.dump_pid(pid, "no", more).unwrap();
        let refused = refused.must_exit(1).unwrap();
        let words = "a connection from outside the tree waits to be accepted: not supported without --ext-unix-sk";
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    let its = format!("--ext-unix-sk={number}");
    let outcome = dump(&scene, &mut child, &[&its]);
    let words = "a connection from outside the tree that waits to be accepted is left out";
    assert!(outcome.stderr.contains(words), "{}", outcome.stderr);
    drop(waits);
    let (target, _) = scene.restore_pid(pid, "img", &[]).unwrap();
    one_may_connect();
    kill(Pid::from_raw(target.pid), Signal::SIGKILL).unwrap();
}
