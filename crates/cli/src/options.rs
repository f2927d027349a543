//! The options: one row each, from which parsing, help, manual page, shell
//! completions and refusals are made.
//!
//! Names and meaning are those of criu(8), version 4.2; a few are ours. An
//! option that would change the result and is not carried yet is refused by
//! name; one that means nothing to an action is ignored with a line in the log.

use crate::actions::Act;

/// Whether an option has a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Takes {
    /// It has none; `--no-NAME` takes it back.
    Nothing,
    /// `--name VALUE`, `--name=VALUE`, `-nVALUE`, `-n VALUE`.
    One(&'static str),
    /// `--name`, `--name=VALUE`, `-n`, `-nVALUE`; `--no-NAME` takes it back.
    Maybe(&'static str),
}

/// How far an option is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carried {
    /// It does what it says.
    Yes,
    /// With these values only.
    Only(&'static [&'static str]),
    /// Refused by name.
    NotYet,
    /// Accepted: nothing here depends on it, for this reason.
    Moot(&'static str),
}

/// One option.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opt {
    pub(crate) long: &'static str,
    pub(crate) short: Option<char>,
    pub(crate) takes: Takes,
    pub(crate) carried: Carried,
    /// The actions it means something to; empty for all.
    pub(crate) acts: &'static [Act],
    /// Each time it is given counts.
    pub(crate) repeats: bool,
    pub(crate) help: &'static str,
}

impl Opt {
    /// Whether it means something to this action.
    pub(crate) fn concerns(&self, act: Act) -> bool {
        self.acts.is_empty() || self.acts.contains(&act)
    }

    const fn short(mut self, c: char) -> Opt {
        self.short = Some(c);
        self
    }
    const fn takes(mut self, value: &'static str) -> Opt {
        self.takes = Takes::One(value);
        self
    }
    const fn maybe(mut self, value: &'static str) -> Opt {
        self.takes = Takes::Maybe(value);
        self
    }
    const fn on(mut self, acts: &'static [Act]) -> Opt {
        self.acts = acts;
        self
    }
    const fn not_yet(mut self) -> Opt {
        self.carried = Carried::NotYet;
        self
    }
    const fn only(mut self, values: &'static [&'static str]) -> Opt {
        self.carried = Carried::Only(values);
        self
    }
    const fn moot(mut self, why: &'static str) -> Opt {
        self.carried = Carried::Moot(why);
        self
    }
    const fn repeats(mut self) -> Opt {
        self.repeats = true;
        self
    }
}

const fn opt(long: &'static str, help: &'static str) -> Opt {
    Opt {
        long,
        short: None,
        takes: Takes::Nothing,
        carried: Carried::Yes,
        acts: &[],
        repeats: false,
        help,
    }
}

use Act::{
    Check, Completions, Cpuinfo, Dedup, Dump, Inspect, LazyPages, Man, PageServer, PreDump,
    Restore, Service, Shim, Support, Swrk, Verify,
};

const DUMPS: &[Act] = &[Dump, PreDump];
const BOTH: &[Act] = &[Dump, PreDump, Restore];
const MAIN: &[Act] = &[Dump, Restore];
const IMAGES: &[Act] = &[
    Dump, PreDump, Restore, Inspect, Verify, Dedup, PageServer, LazyPages, Cpuinfo,
];
const RUNS: &[Act] = &[
    Dump, PreDump, Restore, Service, Swrk, PageServer, LazyPages, Cpuinfo,
];
const PAGES: &[Act] = &[Dump, PreDump, Restore, PageServer, LazyPages];

const SERVERS: &[Act] = &[Service, PageServer, LazyPages];

/// Why what concerns a namespace means nothing.
const NO_MOUNTS: &str = "a tree with mounts of its own is refused, so there are none to carry";
const NO_NETWORK: &str = "a tree with a network of its own is refused, so there is none to carry";

/// All options, in the order of the help.
pub(crate) static OPTIONS: &[Opt] = &[
    // What, and where.
    opt("tree", "Root of the process tree to dump").short('t').takes("PID").on(DUMPS),
    opt("images-dir", "Directory of the image; a dump makes it if it is missing").short('D').takes("DIR").on(IMAGES),
    opt("work-dir", "Directory of log and PID file, if not that of the image").short('W').takes("DIR").on(RUNS),
    opt("log-file", "Write the log to FILE in the work directory, not to stderr").short('o').takes("FILE").on(RUNS),
    opt("verbosity", "More in the log: 0 nothing, 1 errors, 2 warnings (default), 3 what is done, 4 everything; -v is one more each time")
        .short('v')
        .maybe("NUM"),
    opt("json", "The result as JSON on stdout, for machines").on(&[Dump, PreDump, Restore, Check, Inspect, Verify]),
    // A dump.
    opt("leave-running", "Let the tree run on after the dump, instead of ending it").short('R').on(&[Dump]),
    opt("live", "As --leave-running, stopped only until each process is forked, its memory taken from the forks; where that cannot be, an ordinary dump with a warning").on(&[Dump]),
    opt("leave-stopped", "Leave the tree stopped (SIGSTOP)").short('s').on(MAIN),
    opt("timeout", "How long freezing, and any single wait, may take (default 10)").takes("SECONDS").on(BOTH),
    opt("no-sync", "Do not wait until the image is on disk (fsync)").on(DUMPS),
    opt("shell-job", "Accept a session, process group or terminal from outside the tree; at the restore, ours stand in").short('j').on(BOTH),
    opt("orphan-pts-master", "Carry the terminal of a session of the tree though its master is outside; at the restore the new one goes to the client of CRIU's RPC who is told of the steps").on(BOTH),
    opt("external", "A resource given again at the restore by --inherit-fd: file[MNT:INO], tty[RDEV:DEV] (hexadecimal), unix[INO], pipe:[INO]").takes("NAME").on(DUMPS).repeats(),
    opt("file-locks", "Carry file locks and leases; to be given at the restore too").short('l').on(BOTH),
    opt("link-remap", "Carry open (not mapped) files that were deleted but have other names: each dump links them as link_remap.N where they were. A restore takes its link away, so it works once; each dump with -R leaves one more")
        .on(DUMPS),
    opt("ext-unix-sk", "Accept datagram sockets connected to a name outside the tree, and leave out connections from outside that wait to be accepted; with INO,...: only of these sockets")
        .short('x')
        .maybe("INO")
        .on(DUMPS)
        .repeats(),
    opt("ghost-limit", "Largest of the deleted files (ghost files) to carry, in bytes, or with K, M, G (default 1M)").takes("SIZE").on(DUMPS),
    opt("compress", "Compress pages: none (default), lz4 or zstd[:LEVEL]").takes("METHOD").on(DUMPS),
    opt("dedup-pages", "Store pages with equal contents once").on(DUMPS),
    opt("direct", "Write pages past the page cache (O_DIRECT), where the filesystem can do that").on(DUMPS),
    // A restore.
    opt("restore-detached", "Return when the tree runs, instead of waiting for its end; of a service: as --daemon").short('d').on(&[Restore, Service]),
    opt("restore-sibling", "Make the root a child of our parent").short('S').on(&[Restore]),
    opt("pidfile", "Write the PID of the tree's root to FILE in the work directory").takes("FILE").on(&[Restore, Service, PageServer, LazyPages]),
    opt("inherit-fd", "Our descriptor N stands for the resource NAME: fd[N]:NAME, as in 'fd[3]:pipe:[1234]'")
        .takes("FD")
        .on(&[Restore])
        .repeats(),
    // Both.
    opt("tcp-established", "Carry established TCP connections").on(MAIN),
    opt("tcp-close", "Carry connected TCP sockets as closed").on(MAIN),
    opt("skip-in-flight", "Accept that TCP connections which are not accepted yet are reset").on(&[Dump]),
    opt("network-lock", "How the packets of TCP connections are held off: nftables (default; iptables means the same here), or not at all: skip")
        .takes("METHOD")
        .on(MAIN)
        .only(&["nftables", "iptables", "skip"]),
    opt("require-plugins", "If a plugin for devices (cuda-checkpoint, where it is found on PATH) fails, so does the dump or restore; else that is a warning")
        .on(MAIN),
    opt("manage-cgroups", "Carry the cgroups that the tree is in. At the restore: ignore; none (they have to be there), props (they have to be there, and get their settings), soft (default: those that are missing are made, with their settings), full (all get their settings), strict (they must not be there)")
        .maybe("MODE")
        .on(BOTH),
    opt("cgroup-root", "The cgroup DIR stands for that of the tree's root, in the hierarchy of controller CTRL, or in all that are not named")
        .takes("[CTRL:]DIR")
        .on(&[Restore])
        .repeats(),
    opt("display-stats", "Print counts and times at the end").on(BOTH),
    opt("close", "Close our descriptor FD first").takes("FD").on(RUNS).repeats(),
    opt("log-pid", "A log for each process").on(&[Restore]).moot("one process does all the work of a restore, so there is one log"),
    opt("action-script", "Run this at each step, by the shell: CRTOOLS_SCRIPT_ACTION names the step, CRTOOLS_IMAGE_DIR the image, CRTOOLS_INIT_PID the root of the tree. One that fails ends the operation")
        .takes("SCRIPT")
        .on(BOTH)
        .repeats(),
    opt("unprivileged", "Do with the rights there are").on(&[Dump, PreDump, Restore, Check]).moot("it is always tried with the rights there are"),
    opt("no-default-config", "Do not read /etc/criu/default.conf and $HOME/.criu/default.conf (read when called as criu)"),
    opt("config", "Read more options from FILE: one a line, without the dashes").takes("FILE"),
    // check
    opt("feature", "Check for this one feature; 'list' lists them").takes("NAME").on(&[Check]).repeats(),
    opt("extra", "Check also what only some programs need").on(&[Check]),
    opt("experimental", "Check also what is not used yet").on(&[Check]),
    opt("svg", "Draw what the image is made of and the address spaces into this file (-: stdout), instead of printing").takes("FILE").on(&[Inspect]),
    opt("all", "Everything: every feature, every VMA and attribute").on(&[Check, Inspect]),
    opt("ms", "Skip checks of features that are not in mainline").on(&[Check]).moot("only features of the mainline kernel are used"),
    // support
    opt("check", "Compare FILE with what would be printed; exit 1 if it is stale").takes("FILE").on(&[Support]),
    // Not carried, or moot.
    opt("ghost-fiemap", "Find the data of files without a name by fiemap").on(DUMPS).moot("their holes are found by lseek"),
    opt("evasive-devices", "Use any path of a device").on(DUMPS).not_yet(),
    opt("force-irmap", "Find the names of inotify watches by search").on(DUMPS).not_yet(),
    opt("irmap-scan-path", "Where to search for them").takes("DIR").on(DUMPS).repeats().not_yet(),
    opt("freeze-cgroup", "Freeze this cgroup while all in it is seized").takes("DIR").on(DUMPS),
    opt("cgroup-props", "Properties of controllers").takes("SPEC").on(BOTH).not_yet(),
    opt("cgroup-props-file", "Properties of controllers, from a file").takes("FILE").on(BOTH).not_yet(),
    opt("cgroup-dump-controller", "Dump only this controller").takes("NAME").on(DUMPS).repeats().not_yet(),
    opt("cgroup-yard", "Where the cgroups are mounted").takes("DIR").on(BOTH).not_yet(),
    opt("root", "Another root of the mount namespace").short('r').takes("DIR").on(&[Restore]).moot(NO_MOUNTS),
    opt("ext-mount-map", "External mounts").short('M').takes("KEY:VALUE").on(BOTH).repeats().moot(NO_MOUNTS),
    opt("enable-external-sharing", "Accept external shared mounts").on(DUMPS).moot(NO_MOUNTS),
    opt("enable-external-masters", "Accept external master mounts").on(DUMPS).moot(NO_MOUNTS),
    opt("skip-mnt", "Do not carry this mount").takes("DIR").on(DUMPS).repeats().moot(NO_MOUNTS),
    opt("enable-fs", "Treat these filesystems as known").takes("NAMES").on(BOTH).repeats().moot(NO_MOUNTS),
    opt("mntns-compat-mode", "Another way to restore mount namespaces").on(&[Restore]).moot(NO_MOUNTS),
    opt("empty-ns", "Make this namespace, and leave it empty").takes("NS").on(BOTH).repeats().moot(NO_NETWORK),
    opt("join-ns", "Join this namespace").short('J').takes("NS:FILE").on(&[Restore]).repeats().not_yet(),
    opt("veth-pair", "Names of veth devices").takes("IN=OUT").on(&[Restore]).repeats().moot(NO_NETWORK),
    opt("weak-sysctls", "Skip sysctls that are missing").on(&[Restore]).moot("no sysctl is restored"),
    opt("lsm-profile", "LSM profile of the restored tree").takes("TYPE:NAME").on(&[Restore]).not_yet(),
    opt("lsm-mount-context", "SELinux context of mounts").takes("CONTEXT").on(&[Restore]).moot(NO_MOUNTS),
    opt("cpu-cap", "Which CPU features must match").maybe("CAP").on(BOTH).repeats().only(&["none"]),
    opt("file-validation", "How files are compared: filesize or buildid").takes("METHOD").on(BOTH).only(&["filesize"]),
    opt("skip-file-rwx-check", "Do not compare file permissions").on(&[Restore]).moot("file permissions are not compared"),
    opt("allow-uprobes", "Accept the uprobes mapping").on(DUMPS).not_yet(),
    opt("track-mem", "Track memory changes for a later dump").on(DUMPS).not_yet(),
    opt("prev-images-dir", "Directory of the image this one builds on").takes("DIR").on(DUMPS).not_yet(),
    opt("auto-dedup", "Drop what a newer image has again").on(PAGES).moot("no image builds on another"),
    opt("pre-dump-mode", "How a pre-dump reads memory: splice or read").takes("MODE").on(&[PreDump]).not_yet(),
    opt("lazy-pages", "Serve memory when it is asked for").on(PAGES).not_yet(),
    opt("page-server", "Send pages to a page server").on(DUMPS).not_yet(),
    opt("address", "The socket a service listens on (default /var/run/criu_service.socket)").takes("ADDRESS").on(SERVERS),
    opt("port", "Port of the page server").takes("PORT").on(PAGES).not_yet(),
    opt("ps-socket", "Connected socket to the page server").takes("FD").on(PAGES).not_yet(),
    opt("tls", "TLS to the page server").on(PAGES).not_yet(),
    opt("tls-cacert", "CA certificate").takes("FILE").on(PAGES).not_yet(),
    opt("tls-cacrl", "Revoked certificates").takes("FILE").on(PAGES).not_yet(),
    opt("tls-cert", "Our certificate").takes("FILE").on(PAGES).not_yet(),
    opt("tls-key", "Our private key").takes("FILE").on(PAGES).not_yet(),
    opt("tls-no-cn-verify", "Do not compare the server's name with its certificate").on(PAGES).not_yet(),
    opt("daemon", "Go to the background when clients can come, with standard descriptors that lead nowhere (-d, too)").on(SERVERS),
    opt("status-fd", "Write a zero byte to FD when clients can come").takes("FD").on(SERVERS),
    opt("exec-cmd", "Run this command after the restore").on(&[Restore]).not_yet(),
    opt("libdir", "Directory of plugins").short('L').takes("DIR").on(BOTH).not_yet(),
    opt("stream", "Write or read the image as one stream").on(BOTH).not_yet(),
];

/// Actions that take no part in the option groups above.
pub(crate) const WITHOUT_OPTIONS: &[Act] = &[Completions, Man, Shim];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_described() {
        let mut seen = HashSet::new();
        for o in OPTIONS {
            assert!(seen.insert(o.long.to_owned()), "--{} twice", o.long);
            if let Some(c) = o.short {
                assert!(seen.insert(c.to_string()), "-{c} twice");
            }
            assert!(
                !o.help.is_empty() && !o.help.ends_with('.'),
                "--{}: help",
                o.long
            );
        }
    }
}
