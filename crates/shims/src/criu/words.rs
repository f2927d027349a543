//! The options of a request as words of a command line.
//!
//! So a field means what its option means, whatever is refused is refused by
//! the option's name, and a file of options (`config_file`) can override it.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use freezeframe::{Error, Kind as ErrorKind, Result};

use super::client::{Client, Mode, word};
use super::proto::{CgMode, Kind, NetworkLock, Opts, PreDumpMode, Req};

/// The log's name where none is given.
const LOG: &str = "criu.log";

/// CLONE_NEWNET, the one namespace that may be left empty.
const NEWNET: u32 = 0x4000_0000;

/// A request as a command line.
#[derive(Debug, Default)]
pub struct Words {
    /// `--option` and `--option=value`, in no order that matters.
    pub options: Vec<OsString>,
    /// A file of options that override these.
    pub config_file: Option<PathBuf>,
    /// The log, if one is wanted in a file.
    pub log: Option<PathBuf>,
    /// What was asked for and means nothing here, for the log.
    pub ignored: Vec<String>,
    /// What keeps the paths valid.
    pub held: Vec<OwnedFd>,
}

impl Words {
    /// The command line of a request for a dump or a restore.
    ///
    /// # Errors
    /// When it makes no sense.
    pub fn of(req: &Req, client: &Client) -> Result<Words> {
        let mut words = Words::default();
        let opts = req.opts.clone().unwrap_or_default();
        words.places(&opts, client)?;
        words.switches(&opts);
        words.values(&opts)?;
        words.lists(&opts)?;
        words.of_mode(req, &opts, client)?;
        words.config_file = opts
            .config_file
            .filter(|f| !f.is_empty())
            .map(|f| word(&f).into());
        Ok(words)
    }

    fn switch(&mut self, name: &str, on: Option<bool>) {
        if on == Some(true) {
            self.options.push(format!("--{name}").into());
        }
    }

    fn value(&mut self, name: &str, value: impl AsRef<OsStr>) {
        let mut word = OsString::from(format!("--{name}="));
        word.push(value);
        self.options.push(word);
    }

    /// A path or name, if there is one.
    fn bytes(&mut self, name: &str, value: Option<&Vec<u8>>) {
        if let Some(value) = value {
            self.value(name, word(value));
        }
    }

    /// Where image, log and statistics are.
    fn places(&mut self, opts: &Opts, client: &Client) -> Result<()> {
        let images = match &opts.images_dir {
            Some(path) if opts.images_dir_fd == -1 => {
                self.value("images-dir", word(path));
                word(path).into()
            }
            _ => self.directory("images-dir", opts.images_dir_fd, client)?,
        };
        let work = match opts.work_dir_fd {
            Some(fd) => self.directory("work-dir", fd, client)?,
            None => images,
        };
        let name = match &opts.log_file {
            Some(name) if name.is_empty() || name.contains(&b'/') => {
                return Err(odd("log_file", "no name of a file in the work directory"));
            }
            None if opts.log_to_stderr() => None,
            Some(name) => Some(word(name)),
            None => Some(LOG.into()),
        };
        if let Some(name) = name {
            self.value("log-file", &name);
            self.log = Some(work.join(name));
        }
        let level = opts.log_level.unwrap_or(2).clamp(0, 4);
        self.value("verbosity", level.to_string());
        Ok(())
    }

    fn directory(&mut self, name: &str, fd: i32, client: &Client) -> Result<PathBuf> {
        let (path, held) = client.directory(fd, &format!("{}_fd", name.replace('-', "_")))?;
        self.value(name, &path);
        self.held.push(held);
        Ok(path)
    }

    fn switches(&mut self, o: &Opts) {
        for (name, on) in [
            ("leave-running", o.leave_running),
            ("leave-stopped", o.leave_stopped),
            ("ext-unix-sk", o.ext_unix_sk),
            ("tcp-established", o.tcp_established),
            ("tcp-close", o.tcp_close),
            ("skip-in-flight", o.tcp_skip_in_flight),
            ("evasive-devices", o.evasive_devices),
            ("shell-job", o.shell_job),
            ("file-locks", o.file_locks),
            ("track-mem", o.track_mem),
            ("auto-dedup", o.auto_dedup),
            ("link-remap", o.link_remap),
            ("force-irmap", o.force_irmap),
            ("enable-external-sharing", o.ext_sharing),
            ("enable-external-masters", o.ext_masters),
            ("weak-sysctls", o.weak_sysctls),
            ("lazy-pages", o.lazy_pages),
            ("orphan-pts-master", o.orphan_pts_master),
            ("tls", o.tls),
            ("tls-no-cn-verify", o.tls_no_cn_verify),
            ("mntns-compat-mode", o.mntns_compat_mode),
            ("skip-file-rwx-check", o.skip_file_rwx_check),
            ("unprivileged", o.unprivileged),
            ("display-stats", o.display_stats),
        ] {
            self.switch(name, on);
        }
    }

    fn values(&mut self, o: &Opts) -> Result<()> {
        for (name, value) in [
            ("root", &o.root),
            ("prev-images-dir", &o.parent_img),
            ("freeze-cgroup", &o.freeze_cgroup),
            ("cgroup-props", &o.cgroup_props),
            ("cgroup-props-file", &o.cgroup_props_file),
            ("cgroup-yard", &o.cgroup_yard),
            ("tls-cacert", &o.tls_cacert),
            ("tls-cacrl", &o.tls_cacrl),
            ("tls-cert", &o.tls_cert),
            ("tls-key", &o.tls_key),
        ] {
            self.bytes(name, value.as_ref());
        }
        for (name, value) in [
            ("lsm-profile", &o.lsm_profile),
            ("lsm-mount-context", &o.lsm_mount_context),
        ] {
            if let Some(value) = value {
                self.value(name, value);
            }
        }
        for (name, value) in [
            ("timeout", o.timeout.map(i64::from)),
            ("ghost-limit", o.ghost_limit.map(i64::from)),
            ("status-fd", o.status_fd.map(i64::from)),
        ] {
            if let Some(value) = value {
                self.value(name, value.to_string());
            }
        }
        if let Some(caps) = o.cpu_cap {
            self.value("cpu-cap", cpu_caps(caps));
        }
        if let Some(mode) = o.network_lock {
            self.value("network-lock", network_lock(mode)?);
        }
        if let Some(mode) = o.pre_dump_mode {
            self.value("pre-dump-mode", pre_dump_mode(mode)?);
        }
        match (o.manage_cgroups_mode, o.manage_cgroups) {
            (Some(mode), _) => self.value("manage-cgroups", cgroup_mode(mode)?),
            (None, on) => self.switch("manage-cgroups", on),
        }
        match o.empty_ns {
            None | Some(0) => {}
            Some(NEWNET) => self.value("empty-ns", "net"),
            Some(other) => {
                let words = format!("{other:#x}: only a network namespace may be left empty");
                return Err(odd("empty_ns", &words));
            }
        }
        if let Some(ps) = &o.ps {
            self.switch("page-server", Some(true));
            if let Some(address) = &ps.address {
                self.value("address", address);
            }
            if let Some(port) = ps.port {
                self.value("port", port.to_string());
            }
            if let Some(fd) = ps.fd {
                self.value("ps-socket", fd.to_string());
            }
        }
        if o.pidfd_store_sk.is_some() {
            let why = "pidfd_store_sk is ignored: no dump builds on another";
            self.ignored.push(why.to_owned());
        }
        Ok(())
    }

    fn lists(&mut self, o: &Opts) -> Result<()> {
        let all = |list: &[Vec<u8>]| list.iter().map(|v| word(v)).collect::<Vec<_>>();
        let text = |list: &[String]| list.iter().map(OsString::from).collect::<Vec<_>>();
        let pair = |a: OsString, between: &str, b: OsString| {
            let mut both = a;
            both.push(between);
            both.push(b);
            both
        };
        let mut mounts: Vec<OsString> = Vec::new();
        if o.auto_ext_mnt() {
            mounts.push("auto".into());
        }
        mounts.extend(
            o.ext_mnt
                .iter()
                .map(|m| pair(word(&m.key), ":", word(&m.val))),
        );
        let veths = o
            .veths
            .iter()
            .map(|v| pair((&v.if_in).into(), "=", (&v.if_out).into()));
        let roots = o.cg_root.iter().map(|r| match &r.ctrl {
            Some(ctrl) if !ctrl.is_empty() => pair(word(ctrl), ":", word(&r.path)),
            _ => word(&r.path),
        });
        let joined = o.join_ns.iter().map(|j| {
            let named = pair((&j.ns).into(), ":", word(&j.ns_file));
            match &j.extra_opt {
                Some(more) => pair(named, ",", more.into()),
                None => named,
            }
        });
        let sockets = o.unix_sk_ino.iter().map(|s| s.inode.to_string().into());
        for (name, values) in [
            ("ext-mount-map", mounts),
            ("veth-pair", veths.collect()),
            ("cgroup-root", roots.collect()),
            ("join-ns", joined.collect()),
            ("ext-unix-sk", sockets.collect()),
            ("skip-mnt", all(&o.skip_mnt)),
            ("enable-fs", text(&o.enable_fs)),
            ("irmap-scan-path", all(&o.irmap_scan_paths)),
            ("external", all(&o.external)),
            ("cgroup-dump-controller", text(&o.cgroup_dump_controller)),
        ] {
            for value in values {
                self.value(name, value);
            }
        }
        if !o.exec_cmd.is_empty() {
            self.switch("exec-cmd", Some(true));
        }
        Ok(())
    }

    /// What depends on how the client has come to us, and on what it wants.
    fn of_mode(&mut self, req: &Req, o: &Opts, client: &Client) -> Result<()> {
        let swrk = client.mode() == Mode::Swrk;
        for (name, given) in [
            ("rst_sibling", o.rst_sibling.is_some()),
            ("inherit_fd", !o.inherit_fd.is_empty()),
        ] {
            if given && !swrk {
                return Err(odd(name, "not of use to a service: it is for swrk"));
            }
        }
        match req.r#type() {
            Kind::Dump | Kind::PreDump | Kind::SinglePreDump => {
                let pid = o.pid.unwrap_or(client.pid());
                self.value("tree", pid.to_string());
            }
            Kind::Restore => {
                self.switch("restore-detached", Some(true));
                self.switch("restore-sibling", o.rst_sibling);
                for inherited in &o.inherit_fd {
                    let mut value = OsString::from(format!("fd[{}]:", inherited.fd));
                    value.push(word(&inherited.key));
                    self.value("inherit-fd", value);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A field that makes no sense.
fn odd(field: &'static str, words: &str) -> Error {
    Error::new(ErrorKind::Usage, words.to_owned()).on(field)
}

/// The CPU features that are to be the same: a bit for each.
fn cpu_caps(bits: u32) -> String {
    if bits == u32::MAX {
        return "all".to_owned();
    }
    let known = [(1, "fpu"), (2, "cpu"), (4, "ins")];
    let names = known.iter().filter(|(bit, _)| bits & bit != 0);
    let names: Vec<&str> = names.map(|(_, name)| *name).collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(",")
    }
}

fn network_lock(mode: i32) -> Result<&'static str> {
    match NetworkLock::try_from(mode) {
        Ok(NetworkLock::Iptables) => Ok("iptables"),
        Ok(NetworkLock::Nftables) => Ok("nftables"),
        Ok(NetworkLock::Skip) => Ok("skip"),
        Err(_) => Err(odd(
            "network_lock",
            &format!("{mode} is no way to hold off packets"),
        )),
    }
}

fn pre_dump_mode(mode: i32) -> Result<&'static str> {
    match PreDumpMode::try_from(mode) {
        Ok(PreDumpMode::Splice) => Ok("splice"),
        Ok(PreDumpMode::VmRead) => Ok("read"),
        Err(_) => Err(odd(
            "pre_dump_mode",
            &format!("{mode} is no way to read memory"),
        )),
    }
}

fn cgroup_mode(mode: i32) -> Result<&'static str> {
    match CgMode::try_from(mode) {
        Ok(CgMode::Ignore) => Ok("ignore"),
        Ok(CgMode::None) => Ok("none"),
        Ok(CgMode::Props) => Ok("props"),
        Ok(CgMode::Soft | CgMode::Default) => Ok("soft"),
        Ok(CgMode::Full) => Ok("full"),
        Ok(CgMode::Strict) => Ok("strict"),
        Err(_) => Err(odd(
            "manage_cgroups_mode",
            &format!("{mode} is no way to carry cgroups"),
        )),
    }
}
