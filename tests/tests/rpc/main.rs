//! CRIU's RPC: `swrk` and `service`, with a client of ours that can do what a decent one does not.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

mod client;

use client::{Connection, Told, request, request_on};
use freezeframe_shims::criu::proto::{Features, Kind, Opts, Req, Resp};
use freezeframe_tests::programs::Program;
use freezeframe_tests::run::{DEADLINE, Mode, Scene, Target, own_network, own_terminals};
use freezeframe_tests::snapshot::Snapshot;
use freezeframe_tests::snapshot::children;
use freezeframe_tests::tool::binary;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use prost::Message;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Instant;

type Done = Result<(), String>;

/// Of no matter which kind; several processes and some memory.
const PROGRAM: &str = "tree::family";

/// The names of the steps.
fn names(told: &[Told]) -> Vec<&str> {
    told.iter().map(|t| t.script.as_str()).collect()
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, is: T, wanted: T) -> Done {
    if is == wanted {
        return Ok(());
    }
    Err(format!("{what}: {is:?}, not {wanted:?}"))
}

/// A failure of this kind, with these words in its message.
fn fails(resp: &Resp, kind: Kind, words: &str) -> Done {
    equal("type", resp.r#type(), kind)?;
    equal("success", resp.success, false)?;
    let said = resp.cr_errmsg();
    if said.contains(words) && resp.cr_errno() > 0 {
        return Ok(());
    }
    Err(format!(
        "errno {}: {said:?} and not {words:?}",
        resp.cr_errno()
    ))
}

fn succeeds(resp: &Resp) -> Done {
    match resp.success {
        true => Ok(()),
        false => Err(format!("errno {}: {}", resp.cr_errno(), resp.cr_errmsg())),
    }
}

fn image_dir(scene: &Scene) -> File {
    let path = scene.path("img");
    fs::create_dir_all(&path).unwrap();
    File::open(path).unwrap()
}

/// Options of a dump as runtimes send them.
fn dumped(target: &Target) -> Opts {
    Opts {
        pid: Some(target.pid),
        log_level: Some(4),
        log_file: Some(b"dump.log".to_vec()),
        notify_scripts: Some(true),
        ..Opts::default()
    }
}

/// Options of a restore as runtimes send them.
fn restored() -> Opts {
    Opts {
        log_level: Some(4),
        log_file: Some(b"restore.log".to_vec()),
        notify_scripts: Some(true),
        rst_sibling: Some(true),
        ..Opts::default()
    }
}

#[test]
fn versions_and_features() -> Done {
    let client = Connection::swrk()?;
    let more = |req: Req| Req {
        keep_open: Some(true),
        ..req
    };
    let resp = client.ask(&more(request(Kind::Version)))?;
    succeeds(&resp)?;
    let version = resp.version.unwrap();
    equal(
        "version",
        (version.major_number, version.minor_number),
        (4, 2),
    )?;
    equal("gitid", version.gitid, None)?;

    let asked = Features {
        mem_track: Some(true),
        ..Features::default()
    };
    let resp = client.ask(&more(Req {
        features: Some(asked),
        ..request(Kind::FeatureCheck)
    }))?;
    succeeds(&resp)?;
    let features = resp.features.unwrap();
    let all = [
        features.mem_track,
        features.lazy_pages,
        features.pidfd_store,
    ];
    equal("all are told of", all.iter().all(Option::is_some), true)?;
    equal("one not asked for", features.lazy_pages, Some(false))?;

    succeeds(&client.ask(&more(request(Kind::Check)))?)?;
    equal("exit code", client.end()?, Some(0))
}

#[test]
fn what_is_not_carried_is_refused_by_name() -> Done {
    for (kind, name) in [
        (Kind::PreDump, "PRE_DUMP"),
        (Kind::SinglePreDump, "SINGLE_PRE_DUMP"),
        (Kind::PageServer, "PAGE_SERVER"),
        (Kind::PageServerChld, "PAGE_SERVER_CHLD"),
        (Kind::WaitPid, "0 is no PID"),
    ] {
        let client = Connection::swrk()?;
        fails(&client.ask(&request(kind))?, kind, name)?;
        equal(name, client.end()?, Some(1))?;
    }
    let odd = [request(Kind::Empty), request(Kind::Notify)];
    let unknown = Req {
        r#type: 77,
        ..Req::default()
    };
    for req in odd.into_iter().chain([unknown]) {
        let client = Connection::swrk()?;
        fails(&client.ask(&req)?, Kind::Empty, "is no request")?;
        equal("exit code", client.end()?, Some(1))?;
    }
    Ok(())
}

#[test]
fn what_the_cpu_can_do() -> Done {
    let scene = Scene::new()?;
    let images = image_dir(&scene);
    let ask = |kind| {
        let client = Connection::swrk()?;
        let resp = client.ask(&request_on(kind, &images, Opts::default()))?;
        equal("exit code", client.end()?, Some(i32::from(!resp.success)))?;
        Ok::<Resp, String>(resp)
    };
    let file = scene.path("img/cpuinfo.img");
    fails(&ask(Kind::CpuinfoCheck)?, Kind::CpuinfoCheck, "cpuinfo.img")?;
    for kind in [Kind::CpuinfoDump, Kind::CpuinfoCheck] {
        let resp = ask(kind)?;
        succeeds(&resp)?;
        equal("type", resp.r#type(), kind)?;
    }
    // Of a CPU that could do more.
    let text = fs::read_to_string(&file).unwrap();
    let more = text.replacen("\"features\":[", "\"features\":[\"teleport\",", 1);
    equal("changed", more == text, false)?;
    fs::write(&file, more).unwrap();
    let lacks = "this CPU lacks what the image's had: teleport";
    fails(&ask(Kind::CpuinfoCheck)?, Kind::CpuinfoCheck, lacks)?;
    let words = ["cpuinfo", "check", "-D", &scene.dir_text()];
    let missing = Command::new(binary()).args(words).output().unwrap();
    equal("exit code", missing.status.code(), Some(1))?;
    fs::write(&file, "[]").unwrap();
    let odd = ask(Kind::CpuinfoCheck)?;
    fails(&odd, Kind::CpuinfoCheck, "no list of what a CPU can do")
}

#[test]
fn nonsense_is_answered() -> Done {
    let huge = vec![0; 150 << 10];
    for bytes in [&b"\xff\xff\xff"[..], b"\x08", b"\x12\x05abc", b"x", &huge] {
        let client = Connection::swrk()?;
        client.send_bytes(bytes)?;
        fails(&client.receive()?, Kind::Empty, "")?;
        equal("exit code", client.end()?, Some(1))?;
    }
    // And one that says nothing.
    let client = Connection::swrk()?;
    equal("exit code", client.end()?, Some(0))
}

/// Dumps the target, with the client's part.
fn dump(images: &File, target: &Target) -> Done {
    let client = Connection::swrk()?;
    let req = request_on(Kind::Dump, images, dumped(target));
    let (resp, told) = client.ask_with(&req, |_| true)?;
    succeeds(&resp)?;
    equal(
        "steps",
        names(&told),
        vec!["pre-dump", "query-ext-files", "post-dump"],
    )?;
    equal("restored", resp.dump.unwrap().restored, Some(false))?;
    equal("exit code", client.end()?, Some(0))
}

const OF_A_RESTORE: [&str; 6] = [
    "pre-restore",
    "setup-namespaces",
    "post-setup-namespaces",
    "post-restore",
    "pre-resume",
    "post-resume",
];

fn restore(images: &File, target: &Target) -> Done {
    let client = Connection::swrk()?;
    let req = request_on(Kind::Restore, images, restored());
    let mut early = true;
    let (resp, told) = client.ask_with(&req, |step| {
        // Before it runs, as runc needs it.
        early &= step.script != "post-restore" || is_ours(target.pid);
        true
    })?;
    succeeds(&resp)?;
    equal("steps", names(&told), OF_A_RESTORE.to_vec())?;
    let with_pid: Vec<&str> = told
        .iter()
        .filter(|t| t.pid == Some(target.pid))
        .map(|t| t.script.as_str())
        .collect();
    equal("PIDs", with_pid, vec!["setup-namespaces", "post-restore"])?;
    equal("our child at post-restore", early, true)?;
    equal("pid", resp.restore.unwrap().pid, target.pid)?;
    equal("exit code", client.end()?, Some(0))
}

fn is_ours(pid: i32) -> bool {
    children(std::process::id() as i32).contains(&pid)
}

#[test]
fn a_dump_and_a_restore_as_runtimes_do_them() -> Done {
    let scene = Scene::new()?;
    let images = image_dir(&scene);
    let (program, target, before) = scene.start_program(PROGRAM)?;
    dump(&images, &target)?;
    scene.await_gone(&before, DEADLINE)?;
    for name in ["inventory.img", "stats-dump"] {
        equal(name, scene.path("img").join(name).exists(), true)?;
    }
    let log = fs::read_to_string(scene.path("img/dump.log")).unwrap();
    equal(
        "its end",
        log.contains("Dumping finished successfully"),
        true,
    )?;
    restore(&images, &target)?;
    equal(
        "stats-restore",
        scene.path("img/stats-restore").exists(),
        true,
    )?;
    scene.finish(target, &program, &before, Mode::Restore)
}

/// The root of a restored tree is a child of the server's where it is not to be the client's.
#[test]
fn the_end_of_a_restored_tree_can_be_waited_for() -> Done {
    let scene = Scene::new()?;
    let images = image_dir(&scene);
    let (_, target, before) = scene.start_program("pipes::pipe_data")?;
    dump(&images, &target)?;
    scene.await_gone(&before, DEADLINE)?;
    let opts = Opts {
        rst_sibling: None,
        notify_scripts: None,
        ..restored()
    };
    let client = Connection::swrk()?;
    let more = |req: Req| Req {
        keep_open: Some(true),
        ..req
    };
    let pid = Some(target.pid as u32);
    succeeds(&client.ask(&more(request_on(Kind::Restore, &images, opts)))?)?;
    client.send(&more(Req {
        pid,
        ..request(Kind::WaitPid)
    }))?;
    kill(Pid::from_raw(target.pid), Signal::SIGKILL).unwrap();
    let resp = client.receive()?;
    succeeds(&resp)?;
    equal("status", resp.status, Some(Signal::SIGKILL as i32))?;
    let again = Req {
        pid,
        ..request(Kind::WaitPid)
    };
    let resp = client.ask(&again)?;
    fails(&resp, Kind::WaitPid, "is no child of the service")?;
    equal("errno", resp.cr_errno(), nix::errno::Errno::ECHILD as i32)?;
    client.end().map(drop)
}

/// The other side of a terminal: reads until it has said this.
fn says(master: &mut File, words: &str) -> Done {
    let start = Instant::now();
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).ends_with(words) {
        let mut fds = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(1000u16)).unwrap();
        if start.elapsed() > DEADLINE {
            return Err(format!("not {words:?}: {said:?}"));
        }
        if fds[0].any() == Some(true) {
            let mut some = [0; 256];
            let got = master.read(&mut some).map_err(|e| e.to_string())?;
            said.extend(&some[..got]);
        }
    }
    equal("it says", &*String::from_utf8_lossy(&said), words)
}

/// A job with a terminal of its own gets it back, and its client the new master.
#[test]
fn a_client_is_given_the_master_of_a_terminal() -> Done {
    own_terminals()?;
    let scene = Scene::new()?;
    let images = image_dir(&scene);
    let window = Winsize {
        ws_row: 40,
        ws_col: 100,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = openpty(Some(&window), None).unwrap();
    for end in [&pty.master, &pty.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    }
    let end = || std::process::Stdio::from(pty.slave.try_clone().unwrap());
    let script = "stty -echo; echo ready; while read line; do echo \"it was $line\"; done";
    let mut command = Command::new("setsid");
    command.args(["-c", "sh", "-c", script]);
    command.stdin(end()).stdout(end()).stderr(end());
    let mut job = Started(command.spawn().unwrap());
    // It has the slave open, too.
    drop(command);
    let pid = job.0.id() as i32;
    let name = fs::read_link(format!("/proc/{pid}/fd/0")).unwrap();
    let mut master = File::from(pty.master);
    drop(pty.slave);
    says(&mut master, "ready\r\n")?;
    let opts = |log: &str| Opts {
        log_level: Some(4),
        log_file: Some(log.as_bytes().to_vec()),
        orphan_pts_master: Some(true),
        ..Opts::default()
    };
    let dump = Opts {
        pid: Some(pid),
        ..opts("dump.log")
    };
    let client = Connection::swrk()?;
    let plain = Opts {
        orphan_pts_master: Some(false),
        ..dump.clone()
    };
    let resp = client.ask(&request_on(Kind::Dump, &images, plain))?;
    fails(&resp, Kind::Dump, "is outside the tree")?;
    let client = Connection::swrk()?;
    succeeds(&client.ask(&request_on(Kind::Dump, &images, dump))?)?;
    job.0.wait().unwrap();
    drop(master);
    // Nobody would take it.
    let client = Connection::swrk()?;
    let resp = client.ask(&request_on(Kind::Restore, &images, opts("restore.log")))?;
    fails(&resp, Kind::Restore, "takes the master of a terminal")?;
    client.end()?;
    let client = Connection::swrk()?;
    let restore = Opts {
        notify_scripts: Some(true),
        rst_sibling: Some(true),
        ..opts("restore.log")
    };
    let req = request_on(Kind::Restore, &images, restore);
    let (resp, told) = client.ask_with(&req, |_| true)?;
    succeeds(&resp)?;
    let mut steps = OF_A_RESTORE.to_vec();
    steps.insert(3, "orphan-pts-master");
    equal("steps", names(&told), steps)?;
    let mut given = client.take_descriptors();
    equal("descriptors", given.len(), 1)?;
    let mut master = File::from(given.remove(0));
    master.write_all(b"written\n").unwrap();
    says(&mut master, "it was written\r\n")?;
    let now = fs::read_link(format!("/proc/{pid}/fd/0")).unwrap();
    equal("its name", now, name)?;
    let is = freezeframe_sys::fd::ioctl::window_size(&master).unwrap();
    equal("window", is, [40, 100, 0, 0])?;
    // Its session's: hung up, it ends.
    drop(master);
    let ended = waitpid(Pid::from_raw(pid), None).unwrap();
    let hung_up = WaitStatus::Signaled(Pid::from_raw(pid), Signal::SIGHUP, false);
    equal("its end", ended, hung_up)
}

/// Whoever refuses a step, or goes, stops the work, and nothing has happened.
#[test]
fn a_client_may_refuse_each_step() -> Done {
    let scene = Scene::new()?;
    let images = image_dir(&scene);
    let (program, target, before) = scene.start_program(PROGRAM)?;
    let refuse = |kind: Kind, opts: &Opts, refused: &str| {
        let client = Connection::swrk()?;
        let req = request_on(kind, &images, opts.clone());
        let (resp, told) = client.ask_with(&req, |step| step.script != refused)?;
        fails(&resp, kind, &format!("notification {refused}"))?;
        equal(
            "the last step",
            told.last().unwrap().script.as_str(),
            refused,
        )?;
        client.end().map(drop)
    };
    let go = |kind: Kind, opts: &Opts| {
        let client = Connection::swrk()?;
        client.send(&request_on(kind, &images, opts.clone()))?;
        equal("a step", client.receive()?.r#type(), Kind::Notify)?;
        equal(
            "exit code",
            client.end()?.is_some_and(|code| code > 0),
            true,
        )
    };
    for step in ["pre-dump", "query-ext-files", "post-dump"] {
        refuse(Kind::Dump, &dumped(&target), step)?;
    }
    go(Kind::Dump, &dumped(&target))?;
    dump(&images, &target)?;
    scene.await_gone(&before, DEADLINE)?;
    for step in &OF_A_RESTORE[..5] {
        refuse(Kind::Restore, &restored(), step)?;
        scene.await_gone(&before, DEADLINE)?;
    }
    go(Kind::Restore, &restored())?;
    scene.await_gone(&before, DEADLINE)?;
    restore(&images, &target)?;
    scene.finish(target, &program, &before, Mode::Restore)
}

#[test]
fn options_that_are_not_carried_are_refused_by_name() -> Done {
    let scene = Scene::new()?;
    let images = image_dir(&scene);
    let (program, target, before) = scene.start_program(PROGRAM)?;
    let with = |change: &dyn Fn(&mut Opts)| {
        let mut opts = dumped(&target);
        change(&mut opts);
        let client = Connection::swrk()?;
        let resp = client.ask(&request_on(Kind::Dump, &images, opts))?;
        client.end()?;
        Ok::<Resp, String>(resp)
    };
    let resp = with(&|o| {
        o.track_mem = Some(true);
        o.parent_img = Some(b"../parent".to_vec());
    })?;
    fails(
        &resp,
        Kind::Dump,
        "--track-mem, --prev-images-dir are not carried yet",
    )?;
    equal("errno", resp.cr_errno(), 56)?;
    let log = fs::read_to_string(scene.path("img/dump.log")).unwrap();
    equal("log", log.starts_with("Error (options): --track-mem"), true)?;
    let resp = with(&|o| o.log_file = Some(b"../x".to_vec()))?;
    fails(&resp, Kind::Dump, "log_file")?;
    let resp = with(&|o| o.work_dir_fd = Some(777))?;
    fails(&resp, Kind::Dump, "work_dir_fd")?;
    let resp = with(&|o| o.pid = Some(i32::MAX))?;
    fails(&resp, Kind::Dump, "no such process")?;
    equal("errno", resp.cr_errno(), 3)?;
    scene.finish(target, &program, &before, Mode::Running)
}

#[test]
fn a_file_of_options_overrides_the_request() -> Done {
    let scene = Scene::new()?;
    let images = image_dir(&scene);
    fs::create_dir(scene.path("work")).unwrap();
    let work = File::open(scene.path("work")).unwrap();
    let (program, target, before) = scene.start_program(PROGRAM)?;
    let file = scene.path("runc.conf");
    fs::write(&file, "log-file other.log\nleave-running\n").unwrap();
    let text = |path: &Path| Some(path.to_str().unwrap().as_bytes().to_vec());
    for (named, log) in [
        (file, "other.log"),
        (scene.path("missing.conf"), "dump.log"),
    ] {
        let opts = Opts {
            config_file: text(&named),
            leave_running: Some(log == "dump.log"),
            work_dir_fd: Some(std::os::fd::AsRawFd::as_raw_fd(&work)),
            ..dumped(&target)
        };
        let client = Connection::swrk()?;
        succeeds(&client.ask(&request_on(Kind::Dump, &images, opts))?)?;
        client.end()?;
        equal(log, scene.path("work").join(log).exists(), true)?;
    }
    equal("statistics", scene.path("work/stats-dump").exists(), true)?;
    scene.finish(target, &program, &before, Mode::Running)
}

/// What a client says to be off is off, whatever files of options say; and nothing is left out in silence.
#[test]
fn what_is_off_or_unknown_is_not_left_out() -> Done {
    let scene = Scene::new()?;
    let images = image_dir(&scene);
    let (program, target, before) = scene.start_program(PROGRAM)?;
    let home = scene.path("home");
    fs::create_dir_all(home.join(".criu")).unwrap();
    let file = "leave-running\next-unix-sk\nmanage-cgroups\n";
    fs::write(home.join(".criu/default.conf"), file).unwrap();
    let swrk = || Connection::swrk_with(Command::new(binary()).env("HOME", &home));
    let opts = Opts {
        leave_running: Some(false),
        ext_unix_sk: Some(false),
        manage_cgroups: Some(false),
        ..dumped(&target)
    };
    let req = request_on(Kind::Dump, &images, opts);
    // Field 72 of the options, which are merged with those before: on, and a number that stands for nothing.
    let unknown = [req.encode_to_vec(), vec![0x12, 3, 0xc0, 4, 1]].concat();
    let mut odd = req.clone();
    odd.opts.as_mut().unwrap().cpu_cap = Some(8);
    for (bytes, words) in [
        (unknown, "field 72 of opts"),
        (odd.encode_to_vec(), "cpu_cap"),
    ] {
        let client = swrk()?;
        client.send_bytes(&bytes)?;
        fails(&client.receive()?, Kind::Dump, words)?;
        equal("exit code", client.end()?, Some(2))?;
    }
    let client = swrk()?;
    succeeds(&client.ask(&req)?)?;
    client.end()?;
    scene.await_gone(&before, DEADLINE)?;
    restore(&images, &target)?;
    scene.finish(target, &program, &before, Mode::Restore)
}

/// The program, in a network namespace of its own: that is refused, when the network is locked.
fn in_own_network(scene: &Scene) -> Result<(Program, Target, Snapshot), String> {
    std::thread::scope(|s| {
        let inside = || own_network().and_then(|()| scene.start_program(PROGRAM));
        s.spawn(inside).join().unwrap()
    })
}

/// Of a tree with a network of its own the client is told when nothing may reach it.
#[test]
fn the_network_is_locked_and_unlocked() -> Done {
    let scene = Scene::new()?;
    let images = image_dir(&scene);
    let (program, target, before) = in_own_network(&scene)?;
    let client = Connection::swrk()?;
    let req = request_on(Kind::Dump, &images, dumped(&target));
    let (resp, told) = client.ask_with(&req, |_| true)?;
    fails(&resp, Kind::Dump, "network namespace")?;
    let wanted = vec![
        "pre-dump",
        "network-lock",
        "query-ext-files",
        "network-unlock",
    ];
    equal("steps", names(&told), wanted)?;
    equal("exit code", client.end()?, Some(1))?;
    scene.finish(target, &program, &before, Mode::Running)
}

/// Ends with the test, whatever comes.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Service {
    child: Started,
    address: PathBuf,
}

impl Service {
    fn command(scene: &Scene) -> Command {
        let mut command = Command::new(binary());
        command.args(["service", "--address"]);
        command.arg(scene.path("socket"));
        command
    }

    fn start(scene: &Scene) -> Result<Service, String> {
        let address = scene.path("socket");
        let child = Service::command(scene).spawn();
        let child = Started(child.map_err(|e| e.to_string())?);
        let service = Service { child, address };
        let there = || Ok(Connection::to(&service.address).is_ok());
        scene.await_that("the service", there, None)?;
        Ok(service)
    }

    fn ends_well(mut self) -> Done {
        kill(Pid::from_raw(self.child.0.id() as i32), Signal::SIGTERM).unwrap();
        let status = self.child.0.wait().map_err(|e| e.to_string())?;
        equal("exit code", status.code(), Some(0))?;
        equal("its socket", self.address.exists(), false)
    }
}

#[test]
fn a_service_outlives_bad_clients() -> Done {
    let scene = Scene::new()?;
    // Left by one that was killed.
    let socket = std::os::unix::net::UnixListener::bind(scene.path("socket")).unwrap();
    drop(socket);
    let service = Service::start(&scene)?;
    let silent = Connection::to(&service.address)?;
    for bytes in [&b"\xff\xff"[..], b"\x08\x63"] {
        let bad = Connection::to(&service.address)?;
        bad.send_bytes(bytes)?;
        fails(&bad.receive()?, Kind::Empty, "")?;
    }
    let images = image_dir(&scene);
    let (program, target, before) = scene.start_program(PROGRAM)?;
    // Goes in the middle of a dump.
    let gone = Connection::to(&service.address)?;
    gone.send(&request_on(Kind::Dump, &images, dumped(&target)))?;
    equal("a step", gone.receive()?.r#type(), Kind::Notify)?;
    gone.end()?;
    // Two at a time of one tree: one of them has it.
    scene.await_rest(&target)?;
    let client = Connection::to(&service.address)?;
    let (resp, told) =
        client.ask_with(&request_on(Kind::Dump, &images, dumped(&target)), |_| true)?;
    succeeds(&resp)?;
    equal("steps", told.len(), 3)?;
    scene.await_gone(&before, DEADLINE)?;
    // A child of the service cannot be a client's.
    let client = Connection::to(&service.address)?;
    let resp = client.ask(&request_on(Kind::Restore, &images, restored()))?;
    fails(&resp, Kind::Restore, "rst_sibling")?;
    let client = Connection::to(&service.address)?;
    let opts = Opts {
        rst_sibling: None,
        ..restored()
    };
    let resp = client.ask(&request_on(Kind::Restore, &images, opts))?;
    succeeds(&resp)?;
    equal("pid", resp.restore.unwrap().pid, target.pid)?;
    // It comes to us, who adopt orphans, when the process of the client has ended.
    scene.await_that("its adoption", || Ok(is_ours(target.pid)), None)?;
    drop(silent);
    service.ends_well()?;
    scene.await_alone(&target)?;
    scene.finish(target, &program, &before, Mode::Restore)
}

/// In the background it holds nothing of who has started it; and once it has ended nobody can come to it, though a
/// client is still there.
#[test]
fn a_service_in_the_background() -> Done {
    let scene = Scene::new()?;
    let pid_file = scene.path("pid");
    let started = Service::command(&scene)
        .args(["-d", "-o", "log", "--pidfile", "pid", "-W"])
        .arg(scene.path(""))
        .output();
    // Its end: nobody has the pipes any more.
    equal("exit code", started.unwrap().status.code(), Some(0))?;
    let text = fs::read_to_string(pid_file).unwrap();
    let pid = Pid::from_raw(text.trim().parse().unwrap());
    let link = |fd: &str| fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
    for fd in ["0", "1", "2"] {
        equal(fd, link(fd), PathBuf::from("/dev/null"))?;
    }
    let address = scene.path("socket");
    let client = Connection::to(&address)?;
    let open = Req {
        keep_open: Some(true),
        ..request(Kind::Version)
    };
    succeeds(&client.ask(&open)?)?;
    kill(pid, Signal::SIGKILL).unwrap();
    let refused = || Ok(Connection::to(&address).is_err());
    scene.await_that("its end", refused, None)?;
    succeeds(&client.ask(&request(Kind::Version))?)
}

/// A client that is stopped itself could not confirm the steps of its own dump.
#[test]
fn who_asks_for_its_own_dump_is_refused_at_once() -> Done {
    let scene = Scene::new()?;
    let images = image_dir(&scene);
    let service = Service::start(&scene)?;
    for pid in [None, Some(std::process::id() as i32)] {
        let opts = Opts {
            pid,
            notify_scripts: Some(true),
            ..Opts::default()
        };
        for client in [Connection::swrk()?, Connection::to(&service.address)?] {
            let resp = client.ask(&request_on(Kind::Dump, &images, opts.clone()))?;
            fails(&resp, Kind::Dump, "the client itself is in the tree")?;
        }
    }
    service.ends_well()
}

/// A dump under way that leaves the tree running.
fn dump_with_script(scene: &Scene, target: &Target, script: &str) -> Started {
    let mut command = Command::new(binary());
    command.args(["dump", "-R", "-t", &target.pid.to_string(), "-D"]);
    command.arg(scene.path("img"));
    Started(command.args(["--action-script", script]).spawn().unwrap())
}

/// It runs as programs do: no signal is blocked, and at its end what it has started ends too.
#[test]
fn an_action_script_that_is_stopped_leaves_nothing() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program(PROGRAM)?;
    let told = scene.path("told");
    let script = format!(
        "grep SigBlk /proc/self/status > {0}.mask; sleep 1000 & echo $! > {0}; wait",
        told.display()
    );
    let mut dump = dump_with_script(&scene, &target, &script);
    // A line, whole.
    let line = || fs::read_to_string(&told).unwrap_or_default();
    scene.await_that("the script", || Ok(line().ends_with('\n')), None)?;
    let mask = fs::read_to_string(scene.path("told.mask")).unwrap();
    equal("blocked", mask.trim(), "SigBlk:\t0000000000000000")?;
    kill(Pid::from_raw(dump.0.id() as i32), Signal::SIGTERM).unwrap();
    equal("exit code", dump.0.wait().unwrap().code(), Some(1))?;
    // We adopt orphans: nobody else was left.
    let started = Pid::from_raw(line().trim().parse().unwrap());
    let killed = WaitStatus::Signaled(started, Signal::SIGKILL, false);
    let ended = || Ok(waitpid(started, Some(WaitPidFlag::WNOHANG)) == Ok(killed));
    scene.await_that("the end of what it started", ended, None)?;
    scene.finish(target, &program, &before, Mode::Running)
}

#[test]
fn an_action_script_that_locks_unlocks_though_it_was_stopped() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = in_own_network(&scene)?;
    let told = scene.path("told");
    let script = format!(
        "echo $CRTOOLS_SCRIPT_ACTION >> {}; [ $CRTOOLS_SCRIPT_ACTION != network-lock ] || sleep 1000",
        told.display()
    );
    let mut dump = dump_with_script(&scene, &target, &script);
    let told = || fs::read_to_string(&told).unwrap_or_default();
    scene.await_that("the lock", || Ok(told().ends_with("network-lock\n")), None)?;
    kill(Pid::from_raw(dump.0.id() as i32), Signal::SIGTERM).unwrap();
    equal("exit code", dump.0.wait().unwrap().code(), Some(1))?;
    let wanted = "pre-dump\nnetwork-lock\nnetwork-unlock\n";
    equal("steps", told().as_str(), wanted)?;
    // What the script had started.
    scene.await_alone(&target)?;
    scene.finish(target, &program, &before, Mode::Running)
}

/// What takes the place of a client on the command line.
#[test]
fn an_action_script_is_told_of_each_step() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program(PROGRAM)?;
    let told = scene.path("told");
    let script = format!(
        "echo $CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID $CRTOOLS_IMAGE_DIR >> {}; [ ! -e {} ]",
        told.display(),
        scene.path("refuse").display(),
    );
    let words = ["--action-script", script.as_str()];
    fs::write(scene.path("refuse"), "").unwrap();
    let refused = scene.dump_pid(target.pid, "img", &words)?.must_exit(1)?;
    equal("named", refused.stderr.contains("action script"), true)?;
    fs::remove_file(scene.path("refuse")).unwrap();
    fs::remove_file(&told).unwrap();
    scene.dump_pid(target.pid, "img", &words)?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    scene.restore_pid(target.pid, "img", &words)?;
    let image = scene.path("img");
    let line = |name: &str, pid: &str| format!("{name} {pid} {}", image.display());
    let pid = target.pid.to_string();
    let mut wanted = vec![line("pre-dump", &pid), line("post-dump", &pid)];
    wanted.push(line("pre-restore", "").replace("  ", " "));
    wanted.extend(OF_A_RESTORE[1..].iter().map(|name| line(name, &pid)));
    let all = fs::read_to_string(&told).unwrap();
    equal("steps", all.lines().map(str::to_owned).collect(), wanted)?;
    scene.finish(target, &program, &before, Mode::Restore)
}
