//! System V shared memory and IPC namespaces that others use, too: what a dump and a restore refuse, and that a segment is made again.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_sys::ids::Pid;
use freezeframe_sys::ipc::queue_names;
use freezeframe_sys::pidfd::{pidfd_getfd, pidfd_open};
use freezeframe_sys::sysv;
use freezeframe_tests::run::{DEADLINE, Mode, Scene, Target, ipc_left, own_ipc, program_binary};
use freezeframe_tests::tool::freezeframe;
use nix::sched::{CloneFlags, setns};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;

/// Lets a program check itself, and sees it pass and end.
fn end(scene: &Scene, target: &Target) {
    fs::write(scene.path("check"), "").unwrap();
    scene.await_exit(target).unwrap();
    let result = fs::read_to_string(scene.path("result")).unwrap();
    assert_eq!(result, "pass\n");
}

/// The id of the one segment there is.
fn only_segment() -> i32 {
    let all = ipc_left().unwrap();
    assert_eq!(all.len(), 1, "{all:?}");
    let id = all[0].split_whitespace().nth(2).unwrap();
    id.parse().unwrap()
}

#[test]
fn a_segment_that_others_use_is_refused() {
    own_ipc().unwrap();
    let (scene, beside) = (Scene::new().unwrap(), Scene::new().unwrap());
    let (program, target, before) = scene.start_program("sysv::segment_by_key").unwrap();
    let (_, other, _) = beside.start_program("sysv::segment_by_key").unwrap();
    let refused = scene.dump_pid(target.pid, "no", &[]).unwrap();
    let refused = refused.must_exit(1).unwrap();
    let words = "is attached by processes outside the tree too";
    assert!(refused.stderr.contains(words), "{}", refused.told());
    end(&beside, &other);

    let dumped = scene.dump_pid(target.pid, "img", &[]).unwrap();
    dumped.must_exit(0).unwrap();
    scene.await_gone(&before, DEADLINE).unwrap();
    // It stays without its tree, and whoever comes can use it.
    let id = only_segment();
    let beside = Scene::new().unwrap();
    let (_, other, _) = beside.start_program("sysv::segment_by_key").unwrap();
    let dir = scene.path("img").to_string_lossy().into_owned();
    let refused = |words: &str| {
        let outcome = freezeframe(&["restore", "-D", &dir, "-d"], DEADLINE).unwrap();
        let outcome = outcome.must_exit(1).unwrap();
        assert!(outcome.stderr.contains(words), "{}", outcome.told());
    };
    refused("it is in use");
    assert_eq!(sysv::shm_stat(id).unwrap().attached, 1);
    // The last one removes it. Another gets its id.
    end(&beside, &other);
    assert_eq!(ipc_left().unwrap(), Vec::<String>::new());
    sysv::shm_set_next_id(id).unwrap();
    let beside = Scene::new().unwrap();
    let (_, other, _) = beside.start_program("sysv::segment_of_postgres").unwrap();
    assert_eq!(only_segment(), id);
    refused("is not that of the image");
    end(&beside, &other);
    // Its place in the table of the kernel is taken, by one of another id.
    sysv::shm_set_next_id(id + (1 << 15)).unwrap();
    let beside = Scene::new().unwrap();
    let (_, other, _) = beside.start_program("sysv::segment_of_postgres").unwrap();
    assert_eq!(only_segment(), id + (1 << 15));
    refused("is taken");
    assert_eq!(only_segment(), id + (1 << 15));
    end(&beside, &other);
    assert_eq!(ipc_left().unwrap(), Vec::<String>::new());

    // It is made again; by a restore that fails later it is removed.
    let broken = scene.path("broken");
    fs::create_dir(&broken).unwrap();
    for entry in fs::read_dir(&dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        let mut bytes = fs::read(entry.path()).unwrap();
        if name.to_string_lossy().starts_with("pages") {
            let last = bytes.len() - 100;
            bytes[last] ^= 1;
        }
        fs::write(broken.join(name), bytes).unwrap();
    }
    let broken = broken.to_string_lossy();
    let failed = freezeframe(&["restore", "-D", &broken, "-d"], DEADLINE).unwrap();
    failed.must_exit(1).unwrap();
    assert_eq!(ipc_left().unwrap(), Vec::<String>::new());
    let target = scene.restore_pid(target.pid, "img", &[]).unwrap().0;
    assert_eq!(only_segment(), id);
    let mode = Mode::Restore;
    scene.finish(target, &program, &before, mode).unwrap();
    assert_eq!(ipc_left().unwrap(), Vec::<String>::new());
}

#[test]
fn a_segment_whose_key_is_taken_is_refused() {
    own_ipc().unwrap();
    let scene = Scene::new().unwrap();
    let (program, target, before) = scene.start_program("sysv::segment_by_key").unwrap();
    let dumped = scene.dump_pid(target.pid, "img", &[]).unwrap();
    dumped.must_exit(0).unwrap();
    scene.await_gone(&before, DEADLINE).unwrap();
    let id = only_segment();
    sysv::shm_remove(id).unwrap();
    // Another program has made its own meanwhile.
    let beside = Scene::new().unwrap();
    let (_, other, _) = beside.start_program("sysv::segment_by_key").unwrap();
    let taken = only_segment();
    assert_ne!(taken, id);
    let dir = scene.path("img").to_string_lossy().into_owned();
    let refused = freezeframe(&["restore", "-D", &dir, "-d"], DEADLINE).unwrap();
    let refused = refused.must_exit(1).unwrap();
    let words = "shared memory with the key 0x46460005 exists already";
    assert!(refused.stderr.contains(words), "{}", refused.told());
    assert_eq!(only_segment(), taken);
    // The id that the restore wanted is not given to whoever makes the next one.
    let third = Scene::new().unwrap();
    let (_, next, _) = third.start_program("sysv::segment_of_postgres").unwrap();
    assert!(sysv::shm_stat(id).is_err());
    end(&third, &next);
    end(&beside, &other);
    assert_eq!(ipc_left().unwrap(), Vec::<String>::new());
    let target = scene.restore_pid(target.pid, "img", &[]).unwrap().0;
    let mode = Mode::Restore;
    scene.finish(target, &program, &before, mode).unwrap();
}

#[test]
fn a_namespace_that_others_are_in_is_refused() {
    let scene = Scene::new().unwrap();
    let (program, target, before) = scene.start_program("ipcns::semaphores").unwrap();
    let namespace = fs::File::open(format!("/proc/{}/ns/ipc", target.pid)).unwrap();
    let beside = || {
        setns(&namespace, CloneFlags::CLONE_NEWIPC).unwrap();
        Command::new("sleep").arg("100").spawn().unwrap()
    };
    let mut outside = std::thread::scope(|scope| scope.spawn(beside).join()).unwrap();
    let refused = scene.dump_pid(target.pid, "no", &[]).unwrap();
    outside.kill().unwrap();
    outside.wait().unwrap();
    let refused = refused.must_exit(1).unwrap();
    let words = format!(
        "process {}, outside the tree, is in the IPC namespace of the tree too",
        outside.id()
    );
    assert!(refused.stderr.contains(&words), "{}", refused.told());
    let dumped = scene.dump_pid(target.pid, "img", &[]).unwrap();
    dumped.must_exit(0).unwrap();
    scene.await_gone(&before, DEADLINE).unwrap();
    let target = scene.restore_pid(target.pid, "img", &[]).unwrap().0;
    let mode = Mode::Restore;
    scene.finish(target, &program, &before, mode).unwrap();
}

const QUEUE: &str = "mqueue::deleted_with_messages";

/// Its queue without a name, which we have now, too.
fn queue_of(target: &Target) -> OwnedFd {
    let fds = fs::read_dir(format!("/proc/{}/fd", target.pid)).unwrap();
    let mut fds = fds.map(|fd| fd.unwrap());
    let is_queue = |path: PathBuf| path.as_os_str() == "/ff-deleted (deleted)";
    let fd = fds.find(|fd| fs::read_link(fd.path()).is_ok_and(is_queue));
    let fd = fd.unwrap().file_name().into_string().unwrap();
    let process = pidfd_open(Pid(target.pid)).unwrap();
    pidfd_getfd(&process, fd.parse().unwrap()).unwrap()
}

#[test]
fn a_queue_without_a_name_that_the_caller_of_the_library_has_is_refused() {
    own_ipc().unwrap();
    let scene = Scene::new().unwrap();
    let (program, target, before) = scene.start_program(QUEUE).unwrap();
    let ours = queue_of(&target);
    let dump = freezeframe::Dump::new(target.pid).images_dir(scene.path("no"));
    let refused = format!("{:?}", dump.sync(false).run().unwrap_err());
    let words = format!(
        "process {} (fd {}) has open too",
        std::process::id(),
        ours.as_raw_fd()
    );
    assert!(refused.contains(&words), "{refused}");
    drop(ours);
    scene
        .finish(target, &program, &before, Mode::Running)
        .unwrap();
}

#[test]
fn a_queue_without_a_name_is_refused_where_who_has_it_cannot_be_seen() {
    own_ipc().unwrap();
    let scene = Scene::new().unwrap();
    let by = ["setpriv", "--bounding-set", "-sys_ptrace"];
    let mut command = Command::new(by[0]);
    command.args(&by[1..]).arg(program_binary()).arg(QUEUE);
    command.arg(scene.dir_text());
    let target = scene.start(command).unwrap();
    scene.await_file("ready", &target).unwrap();
    scene.await_rest(&target).unwrap();
    let refused = scene.dump_through(&by, target.pid, &[]).unwrap();
    let refused = refused.must_exit(1).unwrap();
    let words = "processes outside the tree cannot be looked at (CAP_SYS_PTRACE)";
    assert!(refused.stderr.contains(words), "{}", refused.told());
    end(&scene, &target);
}

#[test]
fn a_queue_without_a_name_that_others_have_is_refused() {
    own_ipc().unwrap();
    let scene = Scene::new().unwrap();
    let (program, target, before) = scene.start_program(QUEUE).unwrap();
    let ours = queue_of(&target);
    let refused = scene.dump_pid(target.pid, "no", &[]).unwrap();
    let refused = refused.must_exit(1).unwrap();
    let words = format!(
        "process {} (fd {}) has open too",
        std::process::id(),
        ours.as_raw_fd()
    );
    assert!(refused.stderr.contains(&words), "{}", refused.told());
    drop(ours);
    let dumped = scene.dump_pid(target.pid, "img", &[]).unwrap();
    dumped.must_exit(0).unwrap();
    scene.await_gone(&before, DEADLINE).unwrap();
    let target = scene.restore_pid(target.pid, "img", &[]).unwrap().0;
    assert_eq!(queue_names().unwrap(), Vec::<Vec<u8>>::new());
    let mode = Mode::Restore;
    scene.finish(target, &program, &before, mode).unwrap();
}
