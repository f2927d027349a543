//! The service of `examples/agent.rs`, which is as difficult a caller as there is: a few of its rounds, as it is meant to
//! run and where its surroundings are bad. `scripts/harm --long` has it run for long.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::Scene;
use freezeframe_tests::tool::built;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::fs;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

type Done = Result<(), String>;

/// How long one run may take: it is over in some seconds, on a machine that has time.
const DEADLINE: Duration = Duration::from_secs(120);

struct Agent {
    scene: Scene,
    child: Child,
}

impl Agent {
    /// It logs to a file, unless it is given what it has for standard error.
    fn start(words: &[&str], stderr: Option<Stdio>) -> Result<Agent, String> {
        let scene = Scene::new()?;
        let program = built("examples/agent");
        let mut command = Command::new(&program);
        command
            .args(words)
            .env("TMPDIR", scene.dir_text())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        match stderr {
            Some(stderr) => command.stderr(stderr),
            None => {
                command.arg("--log").arg(scene.path("log"));
                command.stderr(fs::File::create(scene.path("stderr")).unwrap())
            }
        };
        let child = command.spawn().map_err(|e| {
            let path = program.display();
            format!("{path}: {e}; `cargo build --workspace --examples` makes it")
        })?;
        Ok(Agent { scene, child })
    }

    fn log(&self) -> String {
        let text = |name| fs::read_to_string(self.scene.path(name)).unwrap_or_default();
        text("log") + &text("stderr")
    }

    /// Whether it has ended; an error if it did not end well.
    fn is_over(&mut self) -> Result<bool, String> {
        match self.child.try_wait().map_err(|e| e.to_string())? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => Err(format!("{status}\n{}", self.log())),
        }
    }

    fn ends_well(mut self) -> Result<String, String> {
        let begun = Instant::now();
        while !self.is_over()? {
            if begun.elapsed() > DEADLINE {
                return Err(format!("not over after {DEADLINE:?}\n{}", self.log()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.scene.nothing_left()?;
        let log = self.log();
        let _ = fs::remove_file(self.scene.path("log"));
        let _ = fs::remove_file(self.scene.path("stderr"));
        let left = fs::read_dir(self.scene.path(".")).unwrap().count();
        match left {
            0 => Ok(log),
            n => Err(format!("it has left {n} files behind")),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Its children end with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn runs(words: &[&str]) -> Done {
    let log = Agent::start(words, None)?.ends_well()?;
    println!("{log}");
    Ok(())
}

#[test]
fn eight_at_a_time() -> Done {
    runs(&["--rounds", "4"])
}

#[test]
fn as_process_1_of_a_namespace() -> Done {
    runs(&["--rounds", "4", "--pid1"])
}

#[test]
fn without_standard_descriptors() -> Done {
    runs(&["--rounds", "4", "--closed"])
}

/// 50 dumps and restores at once, and nothing leaks.
#[test]
fn fifty_at_a_time() -> Done {
    runs(&["--rounds", "2", "--children", "50"])
}

#[test]
fn with_standard_error_full() -> Done {
    let (_reader, writer) = nix::unistd::pipe().unwrap();
    let mut writer = fs::File::from(writer);
    let full = |flags| fcntl(&writer, FcntlArg::F_SETFL(flags)).map(drop).unwrap();
    full(OFlag::O_NONBLOCK);
    while (&writer).write(&[b'x'; 4096]).is_ok_and(|n| n > 0) {}
    full(OFlag::empty());
    writer.flush().unwrap();
    Agent::start(&["--rounds", "4"], Some(writer.into()))?
        .ends_well()
        .map(drop)
}

/// One operation needs almost as many descriptors as there are for eight: what fails is told, its target is as it was, and
/// it works once another is over.
#[test]
fn with_hardly_a_descriptor_left() -> Done {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 44, hard).unwrap();
    let log = Agent::start(&["--rounds", "4"], None)?.ends_well()?;
    println!("{log}");
    match log.contains("again, because") {
        true => Ok(()),
        false => Err("nothing has failed".to_owned()),
    }
}
