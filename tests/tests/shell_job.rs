//! A job of one terminal, restored in another: `--shell-job` gives it the terminal of whoever restores it.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{DEADLINE, Scene, Target, program_binary};
use freezeframe_tests::snapshot::Snapshot;
use freezeframe_tests::tool::binary;
use std::fs;
use std::process::Command;

type Done = Result<(), String>;

/// Starts a script as the leader of a session on a new terminal.
fn on_a_terminal(scene: &Scene, script: &str) -> Result<Target, String> {
    let mut command = Command::new(program_binary());
    let dir = scene.dir_text();
    let script = format!(r#"exec < "$FF_TERMINAL" > "$FF_TERMINAL" 2>&1; {script}"#);
    command.args(["terminal", "/bin/sh", "-c", &script, "sh", &dir]);
    command.arg(binary());
    scene.start(command)
}

fn text(scene: &Scene, name: &str) -> String {
    let text = fs::read_to_string(scene.path(name)).unwrap_or_default();
    text.trim().to_owned()
}

#[test]
fn restored_on_another_terminal() -> Done {
    let scene = Scene::new()?;
    // The job: writes to its terminal and tells which one that is, until it is stopped.
    let job = r#"cd "$1"; n=0
        while [ ! -e stop ]; do
            echo tick || exit 1
            tty <&1 > now.part; echo $n >> log; mv now.part now; n=$((n + 1)); sleep 0.005
        done
        echo done > finished"#;
    fs::write(scene.path("job"), job).map_err(|e| e.to_string())?;
    let leader = r#"/bin/sh "$1/job" "$1" & echo $! > "$1/pid.part"; mv "$1/pid.part" "$1/pid"
        tty <&1 > "$1/first"; while [ ! -e "$1/first-over" ]; do sleep 0.01; done"#;
    let first = on_a_terminal(&scene, leader)?;
    scene.await_that(
        "the job",
        || Ok(text(&scene, "now").starts_with("/dev/pts/") && !text(&scene, "pid").is_empty()),
        Some(&first),
    )?;
    let pid: i32 = text(&scene, "pid")
        .parse()
        .map_err(|e| format!("pid: {e}"))?;
    let before = Snapshot::take(pid);
    scene.dump_pid(pid, "img", &["--shell-job"])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;

    // The first terminal lives on, so that the second has another name.
    let restorer = r#""$2" restore --shell-job -d -D "$1/img" 2> "$1/said"; echo $? > "$1/code.part"
        mv "$1/code.part" "$1/code"; tty <&1 > "$1/second"
        echo $$ > "$1/leader.part"; mv "$1/leader.part" "$1/leader"
        while [ ! -e "$1/second-over" ]; do sleep 0.01; done"#;
    let second = on_a_terminal(&scene, restorer)?;
    scene.await_file("leader", &second)?;
    if text(&scene, "code") != "0" {
        return Err(format!(
            "restore: exit {}\n{}",
            text(&scene, "code"),
            text(&scene, "said")
        ));
    }
    let terminal = text(&scene, "second");
    if terminal == text(&scene, "first") {
        return Err("both terminals have one name".to_owned());
    }
    scene.await_that(
        &format!("{terminal} in `now`"),
        || Ok(text(&scene, "now") == terminal),
        None,
    )?;
    // The shell lends descriptor 1 to what it runs, for a moment: looked at until it is back.
    let wanted = [
        ("stat/session", text(&scene, "leader")),
        ("fd/1/link", terminal.clone()),
        ("fd/2/link", terminal),
    ];
    let mut faults = Vec::new();
    let settled = scene.await_that(
        "session and terminal",
        || {
            let after = Snapshot::take(pid);
            let value = |key: &str| after.values.get(&format!("{pid}/{key}")).cloned();
            faults = wanted
                .iter()
                .filter(|(key, wanted)| value(key).as_ref() != Some(wanted))
                .map(|(key, wanted)| format!("{key}: is {:?}, should be {wanted}", value(key)))
                .collect();
            Ok(faults.is_empty())
        },
        None,
    );
    if settled.is_err() {
        return Err(faults.join("\n"));
    }
    fs::write(scene.path("stop"), "").map_err(|e| e.to_string())?;
    scene.await_exit(&Target { pid })?;
    for (name, target) in [("first-over", first), ("second-over", second)] {
        fs::write(scene.path(name), "").map_err(|e| e.to_string())?;
        scene.await_exit(&target)?;
    }
    let log = text(&scene, "log");
    if !log.lines().zip(0..).all(|(line, n)| line.parse() == Ok(n)) {
        faults.push(format!("the job's count has a gap: {log}"));
    }
    if text(&scene, "finished") != "done" {
        faults.push("the job did not come to its end".to_owned());
    }
    scene.nothing_left()?;
    if faults.is_empty() {
        Ok(())
    } else {
        Err(faults.join("\n"))
    }
}
