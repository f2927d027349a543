//! The self-checking programs: the table of all of them and how one is run.
//!
//! A program sets its feature up, says that it is ready, waits until it is asked, and then checks its own state.
//! Everything the two sides say to each other goes through files in one directory that are opened only for the moment,
//! so nothing of the protocol is in the program while it is dumped but a `nanosleep` loop that looks for a file.

#![allow(
    unsafe_code,
    reason = "programs make the system calls whose results a dump must carry"
)]

mod cx;
pub(crate) mod os;

mod aio;
mod basic;
mod beyond;
mod cgroups;
mod credentials;
mod events;
mod files;
mod futexes;
mod ghosts;
mod ipcns;
mod live;
mod locks;
mod many;
mod mappings;
mod memory;
mod mqueue;
mod netlink;
mod packet;
mod pipes;
mod process;
mod raw;
mod scale;
mod signals;
mod sockets;
mod sysv;
mod tcp;
mod terminal;
mod terminals;
mod threads;
mod timers;
mod tree;
mod udp;
mod unix;

pub use cx::Cx;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;

/// One self-checking program: a row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// The family it belongs to: the module it is written in.
    pub family: &'static str,
    /// Its name, unique in the family.
    pub name: &'static str,
    /// What it shows when it passes, in one line.
    pub proves: &'static str,
    /// What it needs of the machine beyond Linux 6.18 and root.
    pub needs: &'static [Need],
    /// Further arguments for `freezeframe dump`.
    pub dump_args: &'static [&'static str],
    /// Further arguments for `freezeframe restore`.
    pub restore_args: &'static [&'static str],
    /// What a dump of it has to come to.
    pub expect: Expect,
    /// The program's root process is stopped (state `T`) when it is dumped; SIGCONT has to come before the check.
    pub stopped: bool,
    /// The program is given a pseudo-terminal as controlling terminal and standard descriptors, and its session leader
    /// stays outside the tree.
    pub terminal: bool,
    /// Its size comes from `FF_SIZE`: for the tests of scale, not for the modes.
    pub sized: bool,
    /// Differences of `/proc` that this program alone explains: beginnings of keys, with the reason as second.
    pub explained: &'static [(&'static str, &'static str)],
    run: fn(&Cx),
}

/// What a dump of a program has to come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// It is carried.
    Carried,
    /// It is refused: exit 1, an error that says this word, and the program unharmed.
    Refused(&'static str),
    /// It is carried, but by a dump that leaves it running it is refused, as above.
    CarriedIfEnded(&'static str),
    /// One of both. For what nobody promised: never half of it, never silently.
    CarriedOrRefused(&'static str),
}

/// Something a program needs that not every machine has.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Its name, for people: a Debian package, a processor feature, a kernel option.
    pub what: &'static str,
    /// Looks for it, by using it where possible.
    pub here: fn() -> bool,
}

impl Program {
    /// A row with nothing special about it.
    const fn new(name: &'static str, proves: &'static str, run: fn(&Cx)) -> Self {
        Program {
            family: "",
            name,
            proves,
            needs: &[],
            dump_args: &[],
            restore_args: &[],
            expect: Expect::Carried,
            stopped: false,
            terminal: false,
            sized: false,
            explained: &[],
            run,
        }
    }

    const fn needs(mut self, needs: &'static [Need]) -> Self {
        self.needs = needs;
        self
    }

    const fn refused(mut self, word: &'static str) -> Self {
        self.expect = Expect::Refused(word);
        self
    }

    const fn refused_running(mut self, word: &'static str) -> Self {
        self.expect = Expect::CarriedIfEnded(word);
        self
    }

    const fn carried_or_refused(mut self, word: &'static str) -> Self {
        self.expect = Expect::CarriedOrRefused(word);
        self
    }

    const fn stopped(mut self) -> Self {
        self.stopped = true;
        self
    }

    /// Run from a terminal whose session leader is outside, dumped and restored with `--shell-job`.
    const fn terminal(mut self) -> Self {
        self.terminal = true;
        self.dump_args = &["--shell-job"];
        self.restore_args = &["--shell-job"];
        self
    }

    const fn dump_args(mut self, args: &'static [&'static str]) -> Self {
        self.dump_args = args;
        self
    }

    /// Dumped and restored with `--file-locks`.
    const fn file_locks(mut self) -> Self {
        self.dump_args = &["--file-locks"];
        self.restore_args = &["--file-locks"];
        self
    }

    /// Dumped and restored with `--manage-cgroups`.
    const fn cgroups(mut self) -> Self {
        self.dump_args = &["--manage-cgroups"];
        self.restore_args = &["--manage-cgroups"];
        self
    }

    const fn terminal_without_flag(mut self) -> Self {
        self.terminal = true;
        self
    }

    const fn network(mut self, args: &'static [&'static str]) -> Self {
        self.dump_args = args;
        self.restore_args = args;
        self
    }
    const fn sized(mut self) -> Self {
        self.sized = true;
        self
    }

    const fn explained(mut self, keys: &'static [(&'static str, &'static str)]) -> Self {
        self.explained = keys;
        self
    }

    /// `family::name`.
    pub fn full_name(&self) -> String {
        format!("{}::{}", self.family, self.name)
    }

    /// What of its needs this machine lacks.
    pub fn lacks(&self) -> Vec<Need> {
        self.needs.iter().filter(|n| !(n.here)()).copied().collect()
    }
}

const FAMILIES: &[(&str, &[Program])] = &[
    ("basic", basic::PROGRAMS),
    ("pipes", pipes::PROGRAMS),
    ("files", files::PROGRAMS),
    ("ghosts", ghosts::PROGRAMS),
    ("locks", locks::PROGRAMS),
    ("events", events::PROGRAMS),
    ("sockets", sockets::PROGRAMS),
    ("unix", unix::PROGRAMS),
    ("tcp", tcp::PROGRAMS),
    ("udp", udp::PROGRAMS),
    ("raw", raw::PROGRAMS),
    ("packet", packet::PROGRAMS),
    ("netlink", netlink::PROGRAMS),
    ("tree", tree::PROGRAMS),
    ("threads", threads::PROGRAMS),
    ("signals", signals::PROGRAMS),
    ("timers", timers::PROGRAMS),
    ("credentials", credentials::PROGRAMS),
    ("process", process::PROGRAMS),
    ("terminal", terminal::PROGRAMS),
    ("terminals", terminals::PROGRAMS),
    ("beyond", beyond::PROGRAMS),
    ("live", live::PROGRAMS),
    ("scale", scale::PROGRAMS),
    ("memory", memory::PROGRAMS),
    ("many", many::PROGRAMS),
    ("mappings", mappings::PROGRAMS),
    ("sysv", sysv::PROGRAMS),
    ("futexes", futexes::PROGRAMS),
    ("mqueue", mqueue::PROGRAMS),
    ("ipcns", ipcns::PROGRAMS),
    ("aio", aio::PROGRAMS),
    ("cgroups", cgroups::PROGRAMS),
];

/// Every program, in the order of the table.
pub fn all() -> impl Iterator<Item = Program> {
    FAMILIES
        .iter()
        .flat_map(|(family, rows)| rows.iter().map(|row| Program { family, ..*row }))
}

/// Each program that this machine cannot run, with the first thing it lacks.
pub fn missing() -> impl Iterator<Item = (Program, Need)> {
    all().filter_map(|p| p.lacks().first().map(|n| (p, *n)))
}

/// Runs the program called `name` in `dir` and does not come back. With `spoil` it damages its own state before it
/// checks, and must say so: that is how the kit knows that the check can fail.
pub fn main(name: &str, dir: &str, spoil: bool) -> ! {
    let Some(program) = all().find(|p| p.full_name() == name) else {
        eprintln!("ff-program: there is no program {name}");
        std::process::exit(2);
    };
    if !program.terminal {
        os::own_session();
    }
    os::close_from(3);
    let cx = Cx::new(dir, spoil);
    (program.run)(&cx);
    std::process::exit(cx.finish())
}

/// Makes a child with the id `pid`, called "occupier", and ends it when `file` is there. Exits with 1 if it cannot.
pub fn occupy(pid: &str, file: &str) -> ! {
    let pid: i32 = pid.parse().unwrap();
    // struct clone_args: exit_signal is the fifth word, set_tid and its size the ninth and tenth.
    let mut args = [0u64; 11];
    args[4] = libc::SIGCHLD as u64;
    args[8] = os::at(&pid) as u64;
    args[9] = 1;
    match os::syscall(
        libc::SYS_clone3,
        [os::at(&args), size_of_val(&args), 0, 0, 0, 0],
    ) {
        Ok(0) => {
            os::set_comm(b"occupier");
            loop {
                os::sleep_ms(100);
            }
        }
        Ok(_) => {}
        Err(e) => {
            eprintln!("ff-program: PID {pid}: {e}");
            std::process::exit(1);
        }
    }
    while !std::path::Path::new(file).exists() {
        os::sleep_ms(1);
    }
    os::kill(pid, libc::SIGKILL);
    os::waitpid(pid, 0).unwrap();
    std::process::exit(0)
}

/// Runs another program as the leader of a session with a new pseudo-terminal, whose path it finds in `FF_TERMINAL`, and
/// exits with its exit code. What is written to the terminal is thrown away.
pub fn in_terminal(words: &[&str]) -> ! {
    let pty = nix::pty::openpty(None, None).unwrap();
    let path = nix::unistd::ttyname(&pty.slave).unwrap();
    let leader = os::fork_run(|| {
        os::own_session();
        os::syscall(
            libc::SYS_ioctl,
            [os::raw(&pty.slave), libc::TIOCSCTTY as usize, 0, 0, 0, 0],
        )
        .unwrap();
        os::close_from(3);
        let error = std::process::Command::new(words[0])
            .args(&words[1..])
            .env("FF_TERMINAL", &path)
            .exec();
        eprintln!("ff-program: {}: {error}", words[0]);
        127
    });
    drop(pty.slave);
    // Ends when the last one has closed the terminal: reading gives EIO then.
    while os::read_vec(&pty.master, 4096).is_ok() {}
    let (_, status) = os::waitpid(leader, 0).unwrap();
    std::process::exit(os::exited_with(status).unwrap_or(1))
}

/// Runs another program in a session of its own with descriptors 0, 1 and 2 only. Does not come back.
pub fn exec(words: &[&str]) -> ! {
    os::own_session();
    os::close_from(3);
    let mut words = words.to_vec();
    loop {
        match words.as_slice() {
            ["--uid", uid, ..] => {
                os::become_uid(uid.parse().unwrap());
                words.drain(..2);
            }
            ["--stderr", path, ..] => {
                let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND;
                let file = os::open(path.as_ref(), flags).unwrap();
                os::dup_to(file.as_raw_fd(), 2);
                words.drain(..2);
            }
            ["--no-new-privs", ..] => {
                os::prctl(libc::PR_SET_NO_NEW_PRIVS, [1, 0, 0, 0]).unwrap();
                words.drain(..1);
            }
            ["--fail-ioctl", request, errno, ..] => {
                credentials::filter_ioctl(request.parse().unwrap(), Some(errno.parse().unwrap()));
                words.drain(..3);
            }
            ["--die-at-ioctl", request, ..] => {
                credentials::filter_ioctl(request.parse().unwrap(), None);
                words.drain(..2);
            }
            _ => break,
        }
    }
    let error = std::process::Command::new(words[0])
        .args(&words[1..])
        .exec();
    eprintln!("ff-program: {}: {error}", words[0]);
    std::process::exit(127)
}
