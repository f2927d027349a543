//! A container runtime in a few hundred lines, whose containers can be checkpointed and restored.
//!
//! ```text
//! mini-runtime [--dir DIR] build NAME ROOTFS            # an image is a directory with a name
//! mini-runtime run [-d] [--namespaces] IMAGE [CMD...]   # prints the id (c1, c2, ...); the exit code is the command's
//! mini-runtime ps
//! mini-runtime stop ID [SECONDS]                        # SIGTERM to all its processes, after 10 s SIGKILL
//! mini-runtime checkpoint [--leave-running] ID
//! mini-runtime restore [-d] ID
//! mini-runtime logs ID
//! mini-runtime rm ID
//! ```
//!
//! There is no daemon. `run` starts a monitor for the container, a process of its own session that has it as its child,
//! takes over whom it leaves behind, and writes down how it ended (`monitor`). What is known of all containers is in one
//! file of records (`records`). The child is this program again, as `init`: it goes into the image and becomes the
//! command (`init`). So nothing happens between a fork and an exec, and nothing here is unsafe.
//!
//! What to take from it: `checkpoint` calls `Dump` from whichever process asks; `restore` calls `Restore` in a new
//! monitor, which reaps its children itself and says so (`reap(false)`).

mod init;
mod monitor;
mod records;

use std::error::Error as _;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use freezeframe::Dump;
use nix::sys::signal::Signal;

use records::Store;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const USAGE: &str = "usage: mini-runtime [--dir DIR] build NAME ROOTFS | run [-d] [--namespaces] IMAGE [CMD...] | ps \
                     | stop ID [SECONDS] | checkpoint [--leave-running] ID | restore [-d] ID | logs ID | rm ID";
/// What is killed is gone by then.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut words: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut dir =
        std::env::var_os("MINI_RUNTIME_DIR").map_or("/var/lib/mini-runtime".into(), PathBuf::from);
    if words.first() == Some(&"--dir") && words.len() > 1 {
        dir = words[1].into();
        words.drain(..2);
    }
    let done = Store::open(&dir).and_then(|store| act(&store, &words));
    done.unwrap_or_else(|e| {
        let _ = writeln!(io::stderr(), "mini-runtime: {e}");
        ExitCode::FAILURE
    })
}

fn act(store: &Store, words: &[&str]) -> Result<ExitCode> {
    match words {
        ["build", name, rootfs] => build(store, name, Path::new(rootfs)),
        ["run", rest @ ..] => run(store, rest),
        ["ps"] => ps(store),
        ["stop", id] => stop(store, id, Duration::from_secs(10)),
        ["stop", id, seconds] => stop(store, id, Duration::try_from_secs_f32(seconds.parse()?)?),
        ["checkpoint", "--leave-running", id] => checkpoint(store, id, true),
        ["checkpoint", id] => checkpoint(store, id, false),
        ["restore", "-d", id] => restore(store, id, true),
        ["restore", id] => restore(store, id, false),
        ["logs", id] => logs(store, id),
        ["rm", id] => rm(store, id),
        // These two are us, called by ourselves.
        ["monitor", id, how @ ..] => monitor::run(store, id, how),
        ["init", rootfs, namespaces, command @ ..] => {
            Ok(init::run(Path::new(rootfs), *namespaces == "new", command))
        }
        _ => {
            writeln!(io::stderr(), "{USAGE}")?;
            Ok(ExitCode::from(2))
        }
    }
}

fn build(store: &Store, name: &str, rootfs: &Path) -> Result<ExitCode> {
    check_name(name)?;
    let rootfs = rootfs
        .canonicalize()
        .map_err(|e| format!("{}: {e}", rootfs.display()))?;
    if !rootfs.is_dir() {
        return Err(format!("{} is no directory", rootfs.display()).into());
    }
    // Under another name first: who runs the image meanwhile finds the one or the other.
    let new = store.image(&format!(".{name}.{}", std::process::id()));
    symlink(&rootfs, &new)?;
    fs::rename(&new, store.image(name))?;
    Ok(ExitCode::SUCCESS)
}

/// Image names are files' and fields of records.
fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '|', '\n']) {
        return Err(format!("'{name}' is no name of an image").into());
    }
    Ok(())
}

fn run(store: &Store, words: &[&str]) -> Result<ExitCode> {
    let options = words.iter().take_while(|w| w.starts_with('-')).count();
    let (options, words) = words.split_at(options);
    let known = ["-d", "--namespaces"];
    if let Some(odd) = options.iter().find(|o| !known.contains(o)) {
        return Err(format!("run has no option {odd}").into());
    }
    let (image, command) = words.split_first().ok_or("run needs an image")?;
    check_name(image)?;
    let rootfs = store.image(image);
    let rootfs = rootfs
        .canonicalize()
        .map_err(|e| format!("image {image}: {e}"))?;
    let command = if command.is_empty() {
        &["/bin/sh"][..]
    } else {
        command
    };
    if !may_chroot()? {
        writeln!(
            io::stderr(),
            "mini-runtime: warning: no right to chroot: the image is the working directory alone"
        )?;
    }
    let namespaces = if options.contains(&"--namespaces") {
        "new"
    } else {
        "ours"
    };
    let rootfs = rootfs.to_str().ok_or("the image's path is not text")?;
    let how = [&["run", rootfs, namespaces][..], command].concat();
    let (id, starting) = store.create(image)?;
    start(store, &id, &how, options.contains(&"-d"), Some(starting))
}

/// Whether CAP_SYS_CHROOT is ours, as `/proc/self/status` tells.
fn may_chroot() -> Result<bool> {
    let status = fs::read_to_string("/proc/self/status")?;
    let held = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .ok_or("no CapEff in status")?;
    Ok(u64::from_str_radix(held.trim(), 16)? & 1 << 18 != 0)
}

/// Starts a container's monitor, and tells the id once it runs; detached or to its end. `starting` is held until then.
fn start(
    store: &Store,
    id: &str,
    how: &[&str],
    detach: bool,
    starting: Option<File>,
) -> Result<ExitCode> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("--dir")
        .arg(store.dir())
        .args(["monitor", id])
        .args(how);
    let mut monitor: Child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let said = monitor.stdout.take().ok_or("a pipe that is not there")?;
    let mut line = String::new();
    BufReader::new(said).read_line(&mut line)?;
    drop(starting);
    if let Some(e) = line.trim_end().strip_prefix("failed ") {
        monitor.wait()?;
        return Err(e.to_owned().into());
    }
    if line != "started\n" {
        return Err(format!("the monitor of {id} has ended: {}", monitor.wait()?).into());
    }
    writeln!(io::stdout(), "{id}")?;
    if detach {
        return Ok(ExitCode::SUCCESS);
    }
    let status = monitor.wait()?;
    Ok(status
        .code()
        .map_or(ExitCode::FAILURE, |code| ExitCode::from(code as u8)))
}

fn ps(store: &Store) -> Result<ExitCode> {
    let mut out = io::stdout().lock();
    writeln!(out, "ID PID IMAGE STATUS START END EXIT PROCESSES")?;
    for record in store.records()? {
        let processes = match store.monitor_of(&record.id)? {
            Some(monitor) if record.status == "running" => processes_below(monitor)?.len(),
            _ => 0,
        };
        // A dash for what is empty.
        let fields = record.to_string();
        let fields: Vec<&str> = fields
            .split('|')
            .map(|f| if f.is_empty() { "-" } else { f })
            .collect();
        writeln!(out, "{} {processes}", fields.join(" "))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn stop(store: &Store, id: &str, grace: Duration) -> Result<ExitCode> {
    store.running(id)?;
    for (signal, patience) in [(Signal::SIGTERM, grace), (Signal::SIGKILL, PATIENCE)] {
        if let Some(monitor) = store.monitor_of(id)? {
            monitor::signal_all(&processes_below(monitor)?, signal);
        }
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if store.find(id)?.status != "running" {
                return Ok(ExitCode::SUCCESS);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
    Err(format!("{id} was killed, and does not end").into())
}

fn checkpoint(store: &Store, id: &str, leave_running: bool) -> Result<ExitCode> {
    // The monitor waits for this lock before it writes down how the container ended.
    let _lock = store.lock_operation(id)?;
    let record = store.running(id)?;
    let monitor = store.monitor_of(id)?.ok_or("its monitor is gone")?;
    if let Some(orphan) = orphans(monitor, record.pid)?.first() {
        return Err(format!("process {orphan} of {id} has lost its parent, and is not below process {}: it cannot be carried", record.pid).into());
    }
    let dump = Dump::new(record.pid)
        .images_dir(store.checkpoint(id))
        .leave_running(leave_running);
    dump.run().map_err(|e| chain(&e))?;
    if !leave_running {
        store.change(id, |record| record.status = "checkpointed".to_owned())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn restore(store: &Store, id: &str, detach: bool) -> Result<ExitCode> {
    let record = store.find(id)?;
    if record.status == "running" {
        return Err(format!("{id} is running").into());
    }
    start(store, id, &["restore"], detach, None)
}

fn logs(store: &Store, id: &str) -> Result<ExitCode> {
    store.find(id)?;
    io::copy(&mut File::open(store.log(id))?, &mut io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

fn rm(store: &Store, id: &str) -> Result<ExitCode> {
    match &*store.find(id)?.status {
        "running" => return Err(format!("{id} is running: stop it first").into()),
        "created" => return Err(format!("{id} is about to start").into()),
        _ => {}
    }
    store.remove(id)?;
    Ok(ExitCode::SUCCESS)
}

/// An error with all its causes.
fn chain(e: &freezeframe::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        text += &format!(": {e}");
        cause = e.source();
    }
    e.also()
        .iter()
        .for_each(|more| text += &format!("; {more}"));
    text
}

/// Every process and its parent, as `/proc` shows them.
fn parents() -> Result<Vec<(i32, i32)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // `PID (name) state parent ...`; a name may hold anything. One that is gone has no file, a zombie no part in this.
        let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
        let stat = String::from_utf8_lossy(&stat);
        let after = stat.rsplit_once(')').map(|(_, after)| after);
        let mut after = after.unwrap_or_default().split_whitespace();
        let lives = after.next().filter(|state| *state != "Z");
        let parent = lives.and_then(|_| after.next()?.parse().ok());
        all.extend(parent.map(|parent| (pid, parent)));
    }
    Ok(all)
}

/// All processes below a monitor: those of its container, whomever their parents have left behind too.
fn processes_below(monitor: i32) -> Result<Vec<i32>> {
    let all = parents()?;
    let mut found = vec![monitor];
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        found.extend(
            all.iter()
                .filter(|(_, p)| *p == parent)
                .map(|(pid, _)| *pid),
        );
        at += 1;
    }
    found.remove(0);
    Ok(found)
}

/// The monitor's children but the container's first process.
fn orphans(monitor: i32, first: i32) -> Result<Vec<i32>> {
    let of_monitor = |(pid, parent): &(i32, i32)| *parent == monitor && *pid != first;
    Ok(parents()?
        .iter()
        .filter(|p| of_monitor(p))
        .map(|(pid, _)| *pid)
        .collect())
}
