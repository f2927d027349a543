//! Running the `freezeframe` command.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How one run of the command ended.
#[derive(Debug)]
pub struct Outcome {
    /// The words it was called with.
    pub args: Vec<String>,
    /// Its exit code; `None` if a signal ended it or it had to be killed at the deadline.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
    /// From fork to its end.
    pub took: Duration,
}

impl Outcome {
    /// An error with everything there is to know, unless it exited with `code`.
    pub fn must_exit(self, code: i32) -> Result<Self, String> {
        if self.code == Some(code) {
            Ok(self)
        } else {
            Err(format!("wanted exit {code}\n{}", self.told()))
        }
    }

    /// Everything there is to know about it, for a failure.
    pub fn told(&self) -> String {
        let ended = self
            .code
            .map_or("killed, or not done in time".to_owned(), |c| {
                format!("exit {c}")
            });
        let stdout = tail(&self.stdout);
        format!(
            "freezeframe {}\n  {ended}\n{stdout}{}",
            self.args.join(" "),
            tail(&self.stderr)
        )
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..]
        .iter()
        .map(|l| format!("  | {l}\n"))
        .collect()
}

/// The command under test: `FREEZEFRAME_BIN`, or the one built next to this test.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("FREEZEFRAME_BIN") {
        return path.into();
    }
    built("freezeframe")
}

/// A binary of the workspace: tests lie in target/PROFILE/deps, binaries above them.
pub fn built(name: &str) -> PathBuf {
    let exe = std::env::current_exe().expect("a process has an executable");
    let dir = exe.parent().expect("a file lies in a directory");
    let above = dir.parent().filter(|_| dir.ends_with("deps"));
    above.unwrap_or(dir).join(name)
}

/// Runs the command to its end, at most `deadline` long.
pub fn freezeframe<S: AsRef<str>>(args: &[S], deadline: Duration) -> Result<Outcome, String> {
    freezeframe_with(args, &[], deadline)
}

/// The same, with more in its environment.
pub fn freezeframe_with<S: AsRef<str>>(
    args: &[S],
    env: &[(&str, &str)],
    deadline: Duration,
) -> Result<Outcome, String> {
    let args: Vec<String> = args.iter().map(|a| a.as_ref().to_owned()).collect();
    let mut command = Command::new(binary());
    command.args(&args).envs(env.iter().copied());
    run(command, args, deadline)
}

/// Runs any command to its end, at most `deadline` long. Its output goes through files, so that a process that inherits
/// its descriptors does not keep us waiting.
pub fn run(mut command: Command, args: Vec<String>, deadline: Duration) -> Result<Outcome, String> {
    let stdout = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
    let stderr = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
    let file = |f: &tempfile::NamedTempFile| f.reopen().map(Stdio::from).map_err(|e| e.to_string());
    command
        .stdin(Stdio::null())
        .stdout(file(&stdout)?)
        .stderr(file(&stderr)?);
    let start = Instant::now();
    let mut child = command
        .spawn()
        .map_err(|e| format!("{}: {e}", command.get_program().to_string_lossy()))?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            break Some(status);
        }
        if start.elapsed() > deadline {
            child
                .kill()
                .and_then(|()| child.wait())
                .map_err(|e| e.to_string())?;
            break None;
        }
        std::thread::sleep(Duration::from_micros(200));
    };
    let took = start.elapsed();
    let read = |path: &Path| {
        String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
    };
    Ok(Outcome {
        args,
        code: status.and_then(|s| s.code()),
        stdout: read(stdout.path()),
        stderr: read(stderr.path()),
        took,
    })
}
