//! Process trees: who is whose child, in which session and group, stopped, ended, adopted.

use super::os::{self, Region};
use super::{Cx, Program};
use std::fs;
use std::sync::atomic::Ordering::SeqCst;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "family",
        "a tree of 13: every PID and parent, and each parent waits for its children",
        family,
    ),
    Program::new(
        "sessions",
        "sessions and process groups, led by members of the tree",
        sessions,
    ),
    Program::new(
        "group_of_sibling",
        "a child in the group of its elder sibling",
        group_of_sibling,
    ),
    Program::new(
        "session_leader_gone",
        "a session whose leader has ended",
        session_leader_gone,
    ),
    Program::new(
        "group_leader_gone",
        "a process group whose leader has ended",
        group_leader_gone,
    ),
    Program::new(
        "zombies",
        "children that have ended: each with its own code or signal, waited for afterwards",
        zombies,
    ),
    Program::new(
        "zombie_leads",
        "a zombie that leads a session and a group that live on",
        zombie_leads,
    ),
    Program::new(
        "stopped_child",
        "a stopped child stays stopped and goes on at SIGCONT",
        stopped_child,
    ),
    Program::new(
        "stop_not_waited",
        "a stop that the parent has not yet asked for",
        stop_not_waited,
    )
    .carried_or_refused("stop"),
    Program::new(
        "stopped_root",
        "the root of the tree is stopped",
        stopped_root,
    )
    .stopped(),
    Program::new(
        "subreaper",
        "an orphan adopted by a subreaper within the tree",
        subreaper,
    ),
    Program::new(
        "subreaper_flag",
        "the subreaper attribute of a process goes on working",
        subreaper_flag,
    ),
    Program::new(
        "parent_death_signal",
        "the signal a child wants when its parent ends",
        parent_death_signal,
    ),
    Program::new(
        "exit_signal",
        "children that end with another signal than SIGCHLD, or none",
        exit_signal,
    ),
    Program::new(
        "blocked_in_wait",
        "a parent blocked in wait4 gets its child's end",
        blocked_in_wait,
    ),
    Program::new("deep", "a line of 20 generations", deep),
    Program::new(
        "forks_later",
        "new children after the restore: PIDs of the tree are not given away",
        forks_later,
    ),
    Program::new(
        "executed",
        "a child that has executed another program",
        executed,
    ),
    Program::new(
        "shared_fs",
        "two processes that share root, cwd and umask (CLONE_FS)",
        shared_fs,
    )
    .carried_or_refused("CLONE_FS"),
    Program::new(
        "shared_table",
        "two processes that share one descriptor table (CLONE_FILES)",
        shared_table,
    )
    .carried_or_refused("CLONE_FILES"),
    Program::new(
        "shared_memory_space",
        "two processes that share one address space (CLONE_VM)",
        shared_memory_space,
    )
    .carried_or_refused("CLONE_VM"),
    Program::new("vfork", "a parent suspended in vfork", vfork).carried_or_refused("vfork"),
];

fn family(cx: &Cx) {
    let me = os::getpid();
    let mut children = Vec::new();
    for i in 0..3 {
        let name = format!("child{i}");
        let pid = cx.child(&name, |cx| {
            let own = os::getpid();
            let mut grandchildren = Vec::new();
            for j in 0..3 {
                let name = format!("grandchild{j}");
                let pid = cx.child(&name, |cx| {
                    let (here, parent) = (os::getpid(), os::getppid());
                    cx.ready_unspoilt();
                    cx.same(
                        "pid and parent",
                        (os::getpid(), os::getppid()),
                        (here, parent),
                    );
                    cx.same("parent", os::getppid(), own);
                });
                grandchildren.push((name, pid));
            }
            cx.ready_unspoilt();
            cx.same("pid and parent", (os::getpid(), os::getppid()), (own, me));
            grandchildren
                .iter()
                .for_each(|(name, pid)| cx.join(name, *pid));
            cx.same(
                "errno when no child is left",
                os::errno(&os::waitpid(-1, 0)),
                libc::ECHILD,
            );
        });
        children.push((name, pid));
    }
    let endless = os::fork_run(|| {
        loop {
            os::sleep_ms(100);
        }
    });
    cx.ready(|| os::kill(endless, libc::SIGTERM));
    os::kill(endless, libc::SIGKILL);
    cx.same(
        "the last child's end",
        os::waitpid(endless, 0).map(|(_, s)| os::killed_by(s)).ok(),
        Some(Some(libc::SIGKILL)),
    );
    children.iter().for_each(|(name, pid)| cx.join(name, *pid));
    cx.same(
        "errno when no child is left",
        os::errno(&os::waitpid(-1, 0)),
        libc::ECHILD,
    );
}

fn ids() -> (i32, i32, i32) {
    (os::getpid(), os::getpgid(0), os::getsid(0))
}

fn sessions(cx: &Cx) {
    let leader = cx.child("leader", |cx| {
        os::own_session();
        let session = os::getpid();
        let plain = cx.child("plain", |cx| {
            cx.ready_unspoilt();
            cx.same(
                "group, session",
                (os::getpgid(0), os::getsid(0)),
                (session, session),
            );
        });
        let grouped = cx.child("grouped", |cx| {
            os::setpgid(0, 0);
            let member = cx.child("member", |cx| {
                let was = ids();
                cx.ready_unspoilt();
                cx.same("pid, group, session", ids(), was);
            });
            let was = ids();
            cx.ready_unspoilt();
            cx.same("pid, group, session", ids(), was);
            cx.join("member", member);
        });
        let was = ids();
        cx.ready_unspoilt();
        cx.same("pid, group, session", ids(), was);
        cx.join("plain", plain);
        cx.join("grouped", grouped);
    });
    let grouped = cx.child("grouped", |cx| {
        os::setpgid(0, 0);
        let was = ids();
        cx.ready(|| os::setpgid(0, os::getppid()));
        cx.same("pid, group, session", ids(), was);
    });
    let was = ids();
    cx.ready_unspoilt();
    cx.same("pid, group, session", ids(), was);
    cx.join("leader", leader);
    cx.join("grouped", grouped);
}

fn group_of_sibling(cx: &Cx) {
    let elder = cx.child("elder", |cx| {
        os::setpgid(0, 0);
        cx.ready_unspoilt();
        cx.same("group", os::getpgid(0), os::getpid());
    });
    let younger = cx.child("younger", |cx| {
        os::setpgid(0, elder);
        let niece = cx.child("niece", |cx| {
            cx.ready_unspoilt();
            cx.same("group", os::getpgid(0), elder);
        });
        cx.ready(|| os::setpgid(0, 0));
        cx.same("group", os::getpgid(0), elder);
        cx.join("niece", niece);
    });
    cx.ready_unspoilt();
    cx.join("younger", younger);
    cx.join("elder", elder);
}

fn session_leader_gone(cx: &Cx) {
    os::prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0]).unwrap();
    let leader = cx.child_unready("leader", |cx| {
        os::own_session();
        cx.child("left", |cx| {
            let was = ids();
            cx.ready(|| os::setpgid(0, 0));
            cx.same("pid, group, session", ids(), was);
        });
    });
    cx.join("leader", leader);
    let left = orphan(cx, leader);
    cx.same("its session", os::getsid(left), leader);
    cx.ready_unspoilt();
    cx.same(
        "its session and group",
        (os::getsid(left), os::getpgid(left)),
        (leader, if cx.spoiling() { left } else { leader }),
    );
    end_orphan(cx, left);
    cx.collect("leader.left");
}

/// The one child this process has, which it did not make itself.
fn orphan(cx: &Cx, after: i32) -> i32 {
    let mut found = 0;
    let came = cx.until(|| {
        let text =
            fs::read_to_string(format!("/proc/self/task/{}/children", os::getpid())).unwrap();
        found = text
            .split_whitespace()
            .map(|w| w.parse::<i32>().unwrap())
            .find(|p| *p != after)
            .unwrap_or(0);
        found != 0
    });
    assert!(came, "no orphan was adopted");
    found
}

fn end_orphan(cx: &Cx, pid: i32) {
    match os::waitpid(pid, 0) {
        Ok((_, status)) => cx.same("the orphan's end", os::exited_with(status), Some(0)),
        Err(e) => cx.fault(format!("wait for the orphan {pid}: {e}")),
    }
}

fn group_leader_gone(cx: &Cx) {
    let leader = os::fork_run(|| {
        os::setpgid(0, 0);
        fs::write(cx.path("grouped"), "").unwrap();
        loop {
            os::sleep_ms(1000);
        }
    });
    cx.await_file("grouped");
    let one = cx.child("one", |cx| {
        os::setpgid(0, leader);
        cx.ready(|| os::setpgid(0, 0));
        cx.same("group", os::getpgid(0), leader);
    });
    let two = cx.child("two", |cx| {
        os::setpgid(0, leader);
        cx.ready_unspoilt();
        cx.same("group", os::getpgid(0), leader);
    });
    os::kill(leader, libc::SIGKILL);
    os::waitpid(leader, 0).unwrap();
    cx.ready_unspoilt();
    cx.join("one", one);
    cx.join("two", two);
}

fn zombies(cx: &Cx) {
    let codes = [0, 1, 42, 255];
    let exited = codes.map(|code| os::fork_run(|| code));
    let signals = [
        libc::SIGKILL,
        libc::SIGTERM,
        libc::SIGSEGV,
        libc::SIGUSR1,
        40,
    ];
    let killed = signals.map(|signal| {
        os::fork_run(|| {
            // No core, whatever the machine does with one: the status would say so.
            os::prctl_set(libc::PR_SET_DUMPABLE, 0);
            os::syscall(
                libc::SYS_rt_sigaction,
                [signal as usize, os::at(&[0usize; 4]), 0, 8, 0, 0],
            )
            .ok();
            os::kill(os::getpid(), signal);
            0
        })
    });
    let own_name = os::fork_run(|| {
        os::set_comm(b"gone but named");
        3
    });
    for pid in exited.iter().chain(&killed).chain([&own_name]) {
        cx.until(|| os::state_of(*pid) == 'Z');
    }
    cx.ready(|| os::waitpid(exited[2], 0));
    // SAFETY: waitid filled in what a child's end has.
    let told = |i: libc::siginfo_t| unsafe { (i.si_code, i.si_pid(), i.si_status()) };
    for (pid, code) in exited.into_iter().zip(codes) {
        cx.same("state", os::state_of(pid), 'Z');
        let info = os::waitid(pid, libc::WEXITED | libc::WNOWAIT)
            .map(told)
            .ok();
        cx.same("waitid", info, Some((libc::CLD_EXITED, pid, code)));
        cx.same(
            "exit code",
            os::waitpid(pid, 0).map(|(_, s)| os::exited_with(s)).ok(),
            Some(Some(code)),
        );
    }
    for (pid, signal) in killed.into_iter().zip(signals) {
        let info = os::waitid(pid, libc::WEXITED | libc::WNOWAIT)
            .map(told)
            .ok();
        cx.same("waitid", info, Some((libc::CLD_KILLED, pid, signal)));
        cx.same(
            "signal",
            os::waitpid(pid, 0).map(|(_, s)| os::killed_by(s)).ok(),
            Some(Some(signal)),
        );
    }
    let comm = fs::read_to_string(format!("/proc/{own_name}/comm")).unwrap_or_default();
    cx.same("name", comm, "gone but named\n".to_owned());
    os::waitpid(own_name, 0).unwrap();
}

fn zombie_leads(cx: &Cx) {
    os::prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0]).unwrap();
    let leader = cx.child_unready("leader", |cx| {
        os::own_session();
        cx.child("left", |cx| {
            let was = ids();
            cx.ready_unspoilt();
            cx.same("pid, group, session", ids(), was);
        });
    });
    cx.until(|| os::state_of(leader) == 'Z');
    let left = orphan(cx, leader);
    cx.ready(|| os::waitpid(leader, 0));
    cx.same("state of the leader", os::state_of(leader), 'Z');
    cx.join("leader", leader);
    end_orphan(cx, left);
    cx.collect("leader.left");
}

fn stopped_child(cx: &Cx) {
    let counter = Region::shared(os::PAGE);
    let counting = move || {
        os::fork_run(|| {
            loop {
                counter.word(0).fetch_add(1, SeqCst);
                os::sleep_ms(1);
            }
        })
    };
    let child = counting();
    // In a group of its own: an orphaned group ignores SIGTSTP.
    let quiet = cx.child("quiet", |cx| {
        os::setpgid(0, 0);
        cx.ready_unspoilt();
    });
    for (pid, signal) in [(child, libc::SIGSTOP), (quiet, libc::SIGTSTP)] {
        os::kill(pid, signal);
        let (_, status) = os::waitpid(pid, libc::WUNTRACED).unwrap();
        assert!(libc::WIFSTOPPED(status));
    }
    let was = counter.word(0).load(SeqCst);
    cx.ready(|| os::kill(child, libc::SIGCONT));
    os::sleep_ms(20);
    cx.same(
        "states",
        (os::state_of(child), os::state_of(quiet)),
        ('T', 'T'),
    );
    cx.same("the counter", counter.word(0).load(SeqCst), was);
    os::kill(child, libc::SIGCONT);
    os::kill(quiet, libc::SIGCONT);
    cx.check(cx.until(|| counter.word(0).load(SeqCst) > was), || {
        "it does not go on".to_owned()
    });
    cx.same(
        "the parent is told",
        os::waitpid(child, libc::WCONTINUED)
            .map(|(_, s)| libc::WIFCONTINUED(s))
            .ok(),
        Some(true),
    );
    os::kill(child, libc::SIGKILL);
    os::waitpid(child, 0).unwrap();
    cx.join("quiet", quiet);
}

fn stop_not_waited(cx: &Cx) {
    let child = cx.child("child", |cx| cx.ready_unspoilt());
    os::kill(child, libc::SIGSTOP);
    cx.until(|| os::state_of(child) == 'T');
    cx.ready(|| os::waitpid(child, libc::WUNTRACED | libc::WNOHANG));
    let told = os::waitpid(child, libc::WUNTRACED | libc::WNOHANG)
        .map(|(pid, s)| (pid, libc::WSTOPSIG(s)));
    cx.same("the stop", told.ok(), Some((child, libc::SIGSTOP)));
    os::kill(child, libc::SIGCONT);
    cx.join("child", child);
}

fn stopped_root(cx: &Cx) {
    let region = Region::anon(os::PAGE);
    region.fill(1);
    let child = cx.child("child", |cx| cx.ready_unspoilt());
    cx.say_ready();
    os::kill(os::getpid(), libc::SIGSTOP);
    // Here it was stopped; SIGCONT came.
    cx.wait_for_check();
    cx.try_part("memory", || region.verify(1));
    cx.join("child", child);
}

fn subreaper(cx: &Cx) {
    os::prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0]).unwrap();
    let me = os::getpid();
    let middle = cx.child_unready("middle", |cx| {
        cx.child("orphan", |cx| {
            let spoilt = std::cell::Cell::new(me);
            cx.ready(|| spoilt.set(1));
            cx.same("parent", os::getppid(), spoilt.get());
        });
    });
    cx.join("middle", middle);
    let adopted = orphan(cx, 0);
    cx.ready_unspoilt();
    end_orphan(cx, adopted);
    cx.collect("middle.orphan");
}

fn subreaper_flag(cx: &Cx) {
    os::prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0]).unwrap();
    let me = os::getpid();
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.same(
            "a child's own flag",
            os::prctl_get(libc::PR_GET_CHILD_SUBREAPER).unwrap(),
            0,
        );
        let own = os::getpid();
        os::fork_run(|| {
            // Its parent ends; who is its parent then?
            cx.until(|| os::getppid() != own);
            fs::write(cx.path("adopted-by"), os::getppid().to_string()).unwrap();
            0
        });
    });
    cx.ready(|| os::prctl(libc::PR_SET_CHILD_SUBREAPER, [0, 0, 0, 0]));
    cx.same(
        "the flag",
        os::prctl_get(libc::PR_GET_CHILD_SUBREAPER).unwrap(),
        1,
    );
    cx.join("child", child);
    let told = || fs::read_to_string(cx.path("adopted-by")).unwrap_or_default();
    cx.until(|| !told().is_empty());
    let by = told();
    cx.same("who adopted the orphan", by, me.to_string());
    while os::waitpid(-1, 0).is_ok() {}
}

fn parent_death_signal(cx: &Cx) {
    os::prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0]).unwrap();
    let middle = cx.child_unready("middle", |cx| {
        cx.child("child", |cx| {
            os::prctl(libc::PR_SET_PDEATHSIG, [libc::SIGUSR1 as u64, 0, 0, 0]).unwrap();
            let mask = 1u64 << (libc::SIGUSR1 - 1);
            os::syscall(libc::SYS_rt_sigprocmask, [0, os::at(&mask), 0, 8, 0, 0]).unwrap();
            cx.ready(|| os::prctl(libc::PR_SET_PDEATHSIG, [0, 0, 0, 0]));
            cx.same(
                "the signal",
                os::prctl_get(libc::PR_GET_PDEATHSIG).unwrap(),
                libc::SIGUSR1,
            );
            fs::write(cx.path("asked"), "").unwrap();
            let pending = || os::status_line("self", "ShdPnd");
            cx.check(cx.until(|| pending() == "0000000000000200"), || {
                format!("not sent; pending {}", pending())
            });
        });
        cx.ready_unspoilt();
        cx.await_file("asked");
    });
    cx.await_ready("middle");
    cx.ready_unspoilt();
    cx.join("middle", middle);
    let left = orphan(cx, 0);
    end_orphan(cx, left);
    cx.collect("middle.child");
}

/// A child with an exit signal of its own, as the clone system call makes it.
fn clone_with(flags: i32, body: impl FnOnce() -> i32) -> i32 {
    match os::syscall(libc::SYS_clone, [flags as usize, 0, 0, 0, 0, 0]).unwrap() {
        0 => os::exit_now(body()),
        pid => pid as i32,
    }
}

fn exit_signal(cx: &Cx) {
    let endless = |_: i32| loop {
        os::sleep_ms(50);
        if cx.path("end").exists() {
            return 5;
        }
    };
    let with_usr2 = clone_with(libc::SIGUSR2, || endless(0));
    let with_none = clone_with(0, || endless(0));
    let mask = 1u64 << (libc::SIGUSR2 - 1);
    os::syscall(libc::SYS_rt_sigprocmask, [0, os::at(&mask), 0, 8, 0, 0]).unwrap();
    cx.ready(|| {
        fs::write(cx.path("end"), "").unwrap();
        os::waitpid(with_usr2, libc::__WALL)
    });
    cx.same(
        "exit signals",
        [with_usr2, with_none].map(|p| os::stat_field(p, 38)),
        [libc::SIGUSR2, 0].map(|s| s.to_string()),
    );
    cx.same(
        "errno of a wait for plain children",
        os::errno(&os::waitpid(-1, libc::WNOHANG)),
        libc::ECHILD,
    );
    fs::write(cx.path("end"), "").unwrap();
    for pid in [with_usr2, with_none] {
        let end = os::waitpid(pid, libc::__WALL).map(|(_, s)| os::exited_with(s));
        cx.same("end", end.ok(), Some(Some(5)));
    }
    cx.same(
        "pending",
        os::status_line("self", "ShdPnd"),
        "0000000000000800".to_owned(),
    );
}

fn blocked_in_wait(cx: &Cx) {
    let waiter = cx.child_unready("waiter", |cx| {
        let child = os::fork_run(|| {
            cx.wait_for_check();
            if cx.spoiling() { 8 } else { 9 }
        });
        cx.say_ready();
        let end = os::waitpid(child, 0).map(|(pid, s)| (pid, os::exited_with(s)));
        cx.same(
            "what the blocked wait gave",
            end.ok(),
            Some((child, Some(9))),
        );
    });
    cx.await_ready("waiter");
    cx.until(|| os::state_of(waiter) == 'S');
    cx.ready_unspoilt();
    cx.join("waiter", waiter);
}

fn deep(cx: &Cx) {
    fn generation(cx: &Cx, left: u32) {
        let parent = os::getppid();
        if left == 0 {
            cx.ready(|| cx.fault("damaged at the end of the line"));
            return;
        }
        let child = cx.child("d", |cx| generation(cx, left - 1));
        cx.ready_unspoilt();
        cx.same("parent", os::getppid(), parent);
        cx.join("d", child);
    }
    generation(cx, 20);
}

fn forks_later(cx: &Cx) {
    let old: Vec<i32> = (0..5)
        .map(|i| cx.child(&format!("old{i}"), |cx| cx.ready_unspoilt()))
        .collect();
    let mut new = Vec::new();
    cx.ready(|| new.push(old[3]));
    for i in 0..20 {
        let pid = os::fork_run(|| i);
        cx.check(!old.contains(&pid) && !new.contains(&pid), || {
            format!("PID {pid} was given twice")
        });
        new.push(pid);
    }
    for (pid, i) in new.into_iter().zip(0..) {
        cx.same(
            "end of a new one",
            os::waitpid(pid, 0).map(|(_, s)| os::exited_with(s)).ok(),
            Some(Some(i)),
        );
    }
    old.iter()
        .enumerate()
        .for_each(|(i, pid)| cx.join(&format!("old{i}"), *pid));
}

fn executed(cx: &Cx) {
    let (r, w) = os::pipe(0);
    let child = os::fork_run(|| {
        os::syscall(libc::SYS_dup2, [os::raw(&r), 0, 0, 0, 0, 0]).unwrap();
        os::close_from(3);
        let args = [c"cat".as_ptr() as usize, c"-".as_ptr() as usize, 0];
        let environment = [c"FF=1".as_ptr() as usize, 0];
        os::syscall(
            libc::SYS_execve,
            [
                c"/bin/cat".as_ptr() as usize,
                os::at(&args),
                os::at(&environment),
                0,
                0,
                0,
            ],
        )
        .ok();
        1
    });
    drop(r);
    let comm = || fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
    cx.until(|| comm() == "cat\n" && os::state_of(child) == 'S');
    let state = || {
        (
            comm(),
            fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default(),
            fs::read_link(format!("/proc/{child}/exe")).unwrap_or_default(),
        )
    };
    let was = state();
    cx.ready(|| os::kill(child, libc::SIGKILL));
    cx.same("name, arguments, executable", state(), was);
    os::write(&w, b"to /dev/null").ok();
    drop(w);
    cx.same(
        "its end",
        os::waitpid(child, 0).map(|(_, s)| os::exited_with(s)).ok(),
        Some(Some(0)),
    );
}

fn shared_fs(cx: &Cx) {
    let child = clone_with(libc::CLONE_FS | libc::SIGCHLD, || {
        cx.wait_for_check();
        os::syscall(libc::SYS_umask, [0o027, 0, 0, 0, 0, 0]).unwrap();
        0
    });
    let spoilt = std::cell::Cell::new(0o027);
    cx.ready(|| spoilt.set(0));
    os::waitpid(child, 0).unwrap();
    cx.same(
        "the umask the other set",
        os::syscall(libc::SYS_umask, [0, 0, 0, 0, 0, 0]).unwrap(),
        spoilt.get(),
    );
}

fn shared_table(cx: &Cx) {
    let (r, _w) = os::pipe(0);
    let number = os::raw(&r);
    let child = clone_with(libc::CLONE_FILES | libc::SIGCHLD, || {
        cx.wait_for_check();
        os::syscall(libc::SYS_dup3, [number, 100, 0, 0, 0, 0]).unwrap();
        0
    });
    let spoilt = std::cell::Cell::new(true);
    cx.ready(|| spoilt.set(false));
    os::waitpid(child, 0).unwrap();
    let there = os::syscall(libc::SYS_fcntl, [100, libc::F_GETFD as usize, 0, 0, 0, 0]).is_ok();
    cx.same("the descriptor the other made is here", there, spoilt.get());
}

extern "C" fn count_in_shared_space(word: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the word lies in a mapping that outlives this process, which shares the address space.
    let word = unsafe { &*word.cast::<std::sync::atomic::AtomicU32>() };
    while word.load(SeqCst) == 0 {
        let pause = os::timespec(1_000_000);
        os::syscall(libc::SYS_nanosleep, [os::at(&pause), 0, 0, 0, 0, 0]).ok();
    }
    word.fetch_add(1, SeqCst);
    os::exit_now(0)
}

fn shared_memory_space(cx: &Cx) {
    let (stack, page) = (Region::anon(64 * os::PAGE), Region::anon(os::PAGE));
    let word = page.word(0);
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    let argument = std::ptr::from_ref(word).cast_mut().cast();
    // SAFETY: the function uses its own stack only and makes no use of the C library's state of a thread.
    let child = unsafe {
        libc::clone(
            count_in_shared_space,
            stack.end() as *mut libc::c_void,
            flags,
            argument,
        )
    };
    assert!(child > 0);
    cx.ready(|| word.store(7, SeqCst));
    word.store(word.load(SeqCst).max(1), SeqCst);
    os::waitpid(child, 0).unwrap();
    cx.same("the word", word.load(SeqCst), 2);
}

fn vfork(cx: &Cx) {
    let (stack, page) = (Region::anon(64 * os::PAGE), Region::anon(os::PAGE));
    let argument = std::ptr::from_ref(page.word(0)).cast_mut().cast();
    let waiter = cx.child_unready("waiter", |cx| {
        cx.say_ready();
        // Before the child is there: the signal may come before it can block it itself.
        let mask = 1u64 << (libc::SIGUSR1 - 1);
        os::syscall(libc::SYS_rt_sigprocmask, [0, os::at(&mask), 0, 8, 0, 0]).unwrap();
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: as in `shared_memory_space`; the caller is suspended until the child has left.
        let child = unsafe {
            libc::clone(
                ask_for_check,
                stack.end() as *mut libc::c_void,
                flags,
                argument,
            )
        };
        cx.same(
            "its end",
            os::waitpid(child, 0).map(|(_, s)| os::exited_with(s)).ok(),
            Some(Some(0)),
        );
    });
    cx.await_ready("waiter");
    let child = || {
        fs::read_to_string(format!("/proc/{waiter}/task/{waiter}/children"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
    };
    // The child shows another mask while it waits for the signal.
    cx.until(|| os::state_of(waiter) == 'D' && child().is_some_and(|pid| os::state_of(pid) == 'S'));
    // The child of the suspended process ends when its own child list is asked to: by a signal.
    cx.ready(|| os::kill(waiter, libc::SIGKILL));
    if let Some(pid) = child() {
        os::kill(pid, libc::SIGUSR1);
    }
    cx.join("waiter", waiter);
}

extern "C" fn ask_for_check(_: *mut libc::c_void) -> libc::c_int {
    let mask = 1u64 << (libc::SIGUSR1 - 1);
    os::syscall(libc::SYS_rt_sigprocmask, [0, os::at(&mask), 0, 8, 0, 0]).ok();
    os::syscall(libc::SYS_rt_sigtimedwait, [os::at(&mask), 0, 0, 8, 0, 0]).ok();
    os::exit_now(0)
}
