//! The options of a request as words of a command line.
//!
//! So a field means what its option means, whatever is refused is refused by
//! the option's name, and a file of options (`config_file`) can override it.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use freezeframe::{Error, Kind as ErrorKind, Result};

use super::client::{Client, Mode, word};
use super::proto::{
    CgMode, CgroupRoot, ExtMount, InheritFd, JoinNs, Kind, NetworkLock, Opts, PageServer,
    PreDumpMode, Req,
};
use super::unknown::Unknown;

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
    /// The command line of a request for a dump, a restore, or the CPU's features, and of what is not known in it.
    ///
    /// # Errors
    /// When it makes no sense, or asks for what is not known.
    pub fn of(req: &Req, unknown: &[Unknown], client: &Client) -> Result<Words> {
        let mut words = Words::default();
        let opts = req.opts.clone().unwrap_or_default();
        for field in unknown {
            if field.set {
                let odd = Error::new(ErrorKind::Usage, "it is not known to version 4.2 of CRIU");
                return Err(odd.on(field.name.clone()));
            }
            let ignored = format!("{} is 0 and not known: ignored", field.name);
            words.ignored.push(ignored);
        }
        words.places(&opts, client)?;
        words.of_mode(req.r#type(), &opts, client)?;
        words.fields(opts)?;
        Ok(words)
    }

    /// `--name`, and `--no-name` for one that is said to be off: a file of options before may have it on.
    fn switch(&mut self, name: &str, on: Option<bool>) {
        let no = match on {
            Some(true) => "",
            Some(false) => "no-",
            None => return,
        };
        self.options.push(format!("--{no}{name}").into());
    }

    fn value(&mut self, name: &str, value: impl AsRef<OsStr>) {
        let mut word = OsString::from(format!("--{name}="));
        word.push(value);
        self.options.push(word);
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

    /// All fields, each of which is named here or is an error of the compiler's.
    fn fields(&mut self, opts: Opts) -> Result<()> {
        let Opts {
            // Where it all is.
            images_dir_fd: _,
            images_dir: _,
            work_dir_fd: _,
            log_file: _,
            log_level: _,
            log_to_stderr: _,
            // What depends on the request, and on how it came.
            pid: _,
            rst_sibling,
            inherit_fd,
            // For whoever asks for these words.
            notify_scripts: _,
            config_file,
            // Switches.
            leave_running,
            leave_stopped,
            ext_unix_sk,
            tcp_established,
            tcp_close,
            tcp_skip_in_flight,
            evasive_devices,
            shell_job,
            file_locks,
            track_mem,
            auto_dedup,
            link_remap,
            force_irmap,
            ext_sharing,
            ext_masters,
            weak_sysctls,
            lazy_pages,
            orphan_pts_master,
            tls,
            tls_no_cn_verify,
            mntns_compat_mode,
            skip_file_rwx_check,
            unprivileged,
            display_stats,
            manage_cgroups,
            // Values.
            root,
            parent_img,
            freeze_cgroup,
            cgroup_props,
            cgroup_props_file,
            cgroup_yard,
            tls_cacert,
            tls_cacrl,
            tls_cert,
            tls_key,
            lsm_profile,
            lsm_mount_context,
            timeout,
            ghost_limit,
            status_fd,
            cpu_cap,
            network_lock,
            pre_dump_mode,
            manage_cgroups_mode,
            empty_ns,
            pidfd_store_sk,
            ps,
            // Lists.
            veths,
            ext_mnt,
            auto_ext_mnt,
            cg_root,
            join_ns,
            unix_sk_ino,
            skip_mnt,
            enable_fs,
            irmap_scan_paths,
            external,
            cgroup_dump_controller,
            exec_cmd,
        } = opts;
        self.config_file = config_file
            .filter(|f| !f.is_empty())
            .map(|f| word(&f).into());
        for (name, on) in [
            ("restore-sibling", rst_sibling),
            ("leave-running", leave_running),
            ("leave-stopped", leave_stopped),
            ("ext-unix-sk", ext_unix_sk),
            ("tcp-established", tcp_established),
            ("tcp-close", tcp_close),
            ("skip-in-flight", tcp_skip_in_flight),
            ("evasive-devices", evasive_devices),
            ("shell-job", shell_job),
            ("file-locks", file_locks),
            ("track-mem", track_mem),
            ("auto-dedup", auto_dedup),
            ("link-remap", link_remap),
            ("force-irmap", force_irmap),
            ("enable-external-sharing", ext_sharing),
            ("enable-external-masters", ext_masters),
            ("weak-sysctls", weak_sysctls),
            ("lazy-pages", lazy_pages),
            ("orphan-pts-master", orphan_pts_master),
            ("tls", tls),
            ("tls-no-cn-verify", tls_no_cn_verify),
            ("mntns-compat-mode", mntns_compat_mode),
            ("skip-file-rwx-check", skip_file_rwx_check),
            ("unprivileged", unprivileged),
            ("display-stats", display_stats),
            // The mode says whether, too.
            (
                "manage-cgroups",
                manage_cgroups.filter(|_| manage_cgroups_mode.is_none()),
            ),
            ("exec-cmd", (!exec_cmd.is_empty()).then_some(true)),
        ] {
            self.switch(name, on);
        }
        let number = |n: i64| n.to_string().into_bytes();
        for (name, value) in [
            ("root", root),
            ("prev-images-dir", parent_img),
            ("freeze-cgroup", freeze_cgroup),
            ("cgroup-props", cgroup_props),
            ("cgroup-props-file", cgroup_props_file),
            ("cgroup-yard", cgroup_yard),
            ("tls-cacert", tls_cacert),
            ("tls-cacrl", tls_cacrl),
            ("tls-cert", tls_cert),
            ("tls-key", tls_key),
            ("lsm-profile", lsm_profile.map(String::into_bytes)),
            (
                "lsm-mount-context",
                lsm_mount_context.map(String::into_bytes),
            ),
            ("timeout", timeout.map(|n| number(n.into()))),
            ("ghost-limit", ghost_limit.map(|n| number(n.into()))),
            ("status-fd", status_fd.map(|n| number(n.into()))),
            (
                "cpu-cap",
                cpu_cap.map(cpu_caps).transpose()?.map(String::into_bytes),
            ),
            ("network-lock", named(network_lock, network_lock_of)?),
            ("pre-dump-mode", named(pre_dump_mode, pre_dump_mode_of)?),
            (
                "manage-cgroups",
                named(manage_cgroups_mode, cgroup_mode_of)?,
            ),
            (
                "empty-ns",
                named(empty_ns.filter(|ns| *ns != 0), empty_ns_of)?,
            ),
        ] {
            if let Some(value) = value {
                self.value(name, word(&value));
            }
        }
        for (name, values) in [
            ("inherit-fd", inherit_fd.iter().map(inherited).collect()),
            ("ext-mount-map", external_mounts(auto_ext_mnt, &ext_mnt)),
            (
                "veth-pair",
                veths
                    .iter()
                    .map(|v| pair(&v.if_in, "=", &v.if_out))
                    .collect(),
            ),
            ("cgroup-root", cg_root.iter().map(cgroup_root).collect()),
            ("join-ns", join_ns.iter().map(joined).collect()),
            (
                "ext-unix-sk",
                unix_sk_ino
                    .iter()
                    .map(|s| s.inode.to_string().into())
                    .collect(),
            ),
            ("skip-mnt", all(skip_mnt)),
            ("enable-fs", all(enable_fs)),
            ("irmap-scan-path", all(irmap_scan_paths)),
            ("external", all(external)),
            ("cgroup-dump-controller", all(cgroup_dump_controller)),
        ] {
            for value in values {
                self.value(name, value);
            }
        }
        if let Some(server) = ps {
            self.page_server(server);
        }
        if pidfd_store_sk.is_some() {
            let why = "pidfd_store_sk is ignored: no dump builds on another";
            self.ignored.push(why.to_owned());
        }
        Ok(())
    }

    fn page_server(&mut self, server: PageServer) {
        let PageServer {
            address,
            port,
            pid,
            fd,
        } = server;
        self.switch("page-server", Some(true));
        let number = |n: Option<i32>| n.map(|n| n.to_string());
        for (name, value) in [
            ("address", address),
            ("port", number(port)),
            ("ps-socket", number(fd)),
        ] {
            if let Some(value) = value {
                self.value(name, value);
            }
        }
        if pid.is_some() {
            self.ignored
                .push("ps.pid is ignored: it is of answers".to_owned());
        }
    }

    /// What depends on how the client has come to us, and on what it wants.
    fn of_mode(&mut self, kind: Kind, o: &Opts, client: &Client) -> Result<()> {
        for (name, given) in [
            ("rst_sibling", o.rst_sibling.is_some()),
            ("inherit_fd", !o.inherit_fd.is_empty()),
        ] {
            if given && client.mode() != Mode::Swrk {
                return Err(odd(name, "not of use to a service: it is for swrk"));
            }
        }
        if matches!(kind, Kind::CpuinfoDump | Kind::CpuinfoCheck) {
            return Ok(());
        }
        if kind == Kind::Restore {
            self.switch("restore-detached", Some(true));
            if o.pid.is_some() {
                self.ignored
                    .push("pid means nothing to restore: ignored".to_owned());
            }
            return Ok(());
        }
        let pid = o.pid.unwrap_or(client.pid());
        self.value("tree", pid.to_string());
        Ok(())
    }
}

fn pair(a: impl AsRef<[u8]>, between: &str, b: impl AsRef<[u8]>) -> OsString {
    word(&[a.as_ref(), between.as_bytes(), b.as_ref()].concat())
}

fn all<T: AsRef<[u8]>>(list: Vec<T>) -> Vec<OsString> {
    list.iter().map(|value| word(value.as_ref())).collect()
}

fn inherited(i: &InheritFd) -> OsString {
    pair(format!("fd[{}]", i.fd), ":", &i.key)
}

fn external_mounts(auto: Option<bool>, mounts: &[ExtMount]) -> Vec<OsString> {
    let auto = (auto == Some(true)).then(|| OsString::from("auto"));
    let given = mounts.iter().map(|m| pair(&m.key, ":", &m.val));
    auto.into_iter().chain(given).collect()
}

fn cgroup_root(root: &CgroupRoot) -> OsString {
    match &root.ctrl {
        // Empty: of version 2.
        Some(ctrl) => pair(ctrl, ":", &root.path),
        _ => word(&root.path),
    }
}

fn joined(ns: &JoinNs) -> OsString {
    let mut named = pair(&ns.ns, ":", &ns.ns_file);
    if let Some(more) = &ns.extra_opt {
        named.push(",");
        named.push(more);
    }
    named
}

/// A field that makes no sense.
fn odd(field: &'static str, words: &str) -> Error {
    Error::new(ErrorKind::Usage, words.to_owned()).on(field)
}

/// The CPU features that are to be the same: a bit for each.
fn cpu_caps(bits: u32) -> Result<String> {
    if bits == u32::MAX {
        return Ok("all".to_owned());
    }
    let known = [(1, "fpu"), (2, "cpu"), (4, "ins")];
    let strange = known.iter().fold(bits, |rest, (bit, _)| rest & !bit);
    if strange != 0 {
        return Err(odd("cpu_cap", &format!("{strange:#x} stands for nothing")));
    }
    let names = known.iter().filter(|(bit, _)| bits & bit != 0);
    let names: Vec<&str> = names.map(|(_, name)| *name).collect();
    Ok(match names.as_slice() {
        [] => "none".to_owned(),
        names => names.join(","),
    })
}

/// The word for a number, if there is one.
fn named<T>(
    number: Option<T>,
    name: impl Fn(T) -> Result<&'static str>,
) -> Result<Option<Vec<u8>>> {
    Ok(number.map(name).transpose()?.map(Vec::from))
}

fn empty_ns_of(namespaces: u32) -> Result<&'static str> {
    match namespaces {
        NEWNET => Ok("net"),
        other => {
            let words = format!("{other:#x}: only a network namespace may be left empty");
            Err(odd("empty_ns", &words))
        }
    }
}

fn network_lock_of(mode: i32) -> Result<&'static str> {
    match NetworkLock::try_from(mode) {
        Ok(NetworkLock::Iptables) => Ok("iptables"),
        Ok(NetworkLock::Nftables) => Ok("nftables"),
        Ok(NetworkLock::Skip) => Ok("skip"),
        Err(_) => Err(unnamed("network_lock", mode, "way to hold off packets")),
    }
}

fn pre_dump_mode_of(mode: i32) -> Result<&'static str> {
    match PreDumpMode::try_from(mode) {
        Ok(PreDumpMode::Splice) => Ok("splice"),
        Ok(PreDumpMode::VmRead) => Ok("read"),
        Err(_) => Err(unnamed("pre_dump_mode", mode, "way to read memory")),
    }
}

fn cgroup_mode_of(mode: i32) -> Result<&'static str> {
    match CgMode::try_from(mode) {
        Ok(CgMode::Ignore) => Ok("ignore"),
        Ok(CgMode::None) => Ok("none"),
        Ok(CgMode::Props) => Ok("props"),
        Ok(CgMode::Soft | CgMode::Default) => Ok("soft"),
        Ok(CgMode::Full) => Ok("full"),
        Ok(CgMode::Strict) => Ok("strict"),
        Err(_) => Err(unnamed("manage_cgroups_mode", mode, "way to carry cgroups")),
    }
}

fn unnamed(field: &'static str, mode: i32, what: &str) -> Error {
    odd(field, &format!("{mode} is no {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::proto::{UnixSk, VethPair};
    use crate::criu::unknown_fields;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use prost::Message;

    fn client(mode: Mode) -> Client {
        let flags = SockFlag::SOCK_CLOEXEC;
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
        Client::new(pair.unwrap().0, mode).unwrap()
    }

    fn request(kind: Kind, opts: Opts) -> Req {
        Req {
            r#type: kind.into(),
            opts: Some(Opts {
                images_dir_fd: -1,
                images_dir: Some(b"/i".to_vec()),
                ..opts
            }),
            ..Req::default()
        }
    }

    fn words(kind: Kind, opts: Opts) -> Vec<String> {
        let req = request(kind, opts);
        assert_eq!(unknown_fields(&req.encode_to_vec()), []);
        let words = Words::of(&req, &[], &client(Mode::Swrk)).unwrap();
        let text = |w: OsString| w.into_string().unwrap();
        words.options.into_iter().map(text).collect()
    }

    /// The words that an option adds to those of a request without any.
    fn added(opts: Opts) -> String {
        let plain = words(Kind::Restore, Opts::default());
        let all = words(Kind::Restore, opts);
        let new: Vec<_> = all.into_iter().filter(|w| !plain.contains(w)).collect();
        new.join(" ")
    }

    /// Each field sets one of these.
    macro_rules! each {
        ($($field:ident: $value:expr => $words:literal,)*) => {
            [$((stringify!($field), added(Opts { $field: $value, ..Opts::default() }), $words)),*]
        };
    }

    #[test]
    fn each_value_and_its_word() {
        let b = |text: &str| Some(text.as_bytes().to_vec());
        let one = |text: &str| vec![text.as_bytes().to_vec()];
        let text = |text: &str| Some(text.to_owned());
        let table = each! {
            root: b("r") => "--root=r",
            parent_img: b("p") => "--prev-images-dir=p",
            freeze_cgroup: b("f") => "--freeze-cgroup=f",
            cgroup_props: b("c") => "--cgroup-props=c",
            cgroup_props_file: b("c") => "--cgroup-props-file=c",
            cgroup_yard: b("y") => "--cgroup-yard=y",
            tls_cacert: b("t") => "--tls-cacert=t",
            tls_cacrl: b("t") => "--tls-cacrl=t",
            tls_cert: b("t") => "--tls-cert=t",
            tls_key: b("t") => "--tls-key=t",
            lsm_profile: text("l") => "--lsm-profile=l",
            lsm_mount_context: text("l") => "--lsm-mount-context=l",
            timeout: Some(7) => "--timeout=7",
            ghost_limit: Some(8) => "--ghost-limit=8",
            status_fd: Some(9) => "--status-fd=9",
            log_level: Some(4) => "--verbosity=4",
            log_file: b("l") => "--log-file=l",
            cpu_cap: Some(u32::MAX) => "--cpu-cap=all",
            cpu_cap: Some(0) => "--cpu-cap=none",
            cpu_cap: Some(5) => "--cpu-cap=fpu,ins",
            network_lock: Some(2) => "--network-lock=nftables",
            pre_dump_mode: Some(2) => "--pre-dump-mode=read",
            manage_cgroups_mode: Some(0) => "--manage-cgroups=ignore",
            empty_ns: Some(NEWNET) => "--empty-ns=net",
            empty_ns: Some(0) => "",
            pidfd_store_sk: Some(1) => "",
            pid: Some(1) => "",
            config_file: b("c") => "",
            notify_scripts: Some(true) => "",
            ps: Some(PageServer { address: text("a"), port: Some(1), pid: Some(2), fd: Some(3) })
                => "--page-server --address=a --port=1 --ps-socket=3",
            inherit_fd: vec![InheritFd { key: b"k".to_vec(), fd: 3 }] => "--inherit-fd=fd[3]:k",
            veths: vec![VethPair { if_in: "i".to_owned(), if_out: "o".to_owned() }]
                => "--veth-pair=i=o",
            ext_mnt: vec![ExtMount { key: b"k".to_vec(), val: b"v".to_vec() }]
                => "--ext-mount-map=k:v",
            auto_ext_mnt: Some(true) => "--ext-mount-map=auto",
            auto_ext_mnt: Some(false) => "",
            cg_root: vec![CgroupRoot { ctrl: b("c"), path: b"p".to_vec() }] => "--cgroup-root=c:p",
            cg_root: vec![CgroupRoot { ctrl: b(""), path: b"p".to_vec() }] => "--cgroup-root=:p",
            join_ns: vec![JoinNs { ns: "net".to_owned(), ns_file: b"f".to_vec(), extra_opt: text("1") }]
                => "--join-ns=net:f,1",
            unix_sk_ino: vec![UnixSk { inode: 5 }] => "--ext-unix-sk=5",
            skip_mnt: one("m") => "--skip-mnt=m",
            enable_fs: vec!["f".to_owned()] => "--enable-fs=f",
            irmap_scan_paths: one("p") => "--irmap-scan-path=p",
            external: one("x") => "--external=x",
            cgroup_dump_controller: vec!["c".to_owned()] => "--cgroup-dump-controller=c",
            exec_cmd: one("x") => "--exec-cmd",
        };
        for (field, is, wanted) in table {
            assert_eq!(is, wanted, "{field}");
        }
    }

    #[test]
    fn each_switch_and_its_word() {
        /// Of each field, what it adds when it is on, and when it is off.
        macro_rules! switches {
            ($($field:ident => $name:literal,)*) => {$(
                for (on, no) in [(true, ""), (false, "no-")] {
                    let is = added(Opts { $field: Some(on), ..Opts::default() });
                    assert_eq!(is, format!("--{no}{}", $name), stringify!($field));
                }
            )*};
        }
        switches! {
            rst_sibling => "restore-sibling",
            leave_running => "leave-running",
            leave_stopped => "leave-stopped",
            ext_unix_sk => "ext-unix-sk",
            tcp_established => "tcp-established",
            tcp_close => "tcp-close",
            tcp_skip_in_flight => "skip-in-flight",
            evasive_devices => "evasive-devices",
            shell_job => "shell-job",
            file_locks => "file-locks",
            track_mem => "track-mem",
            auto_dedup => "auto-dedup",
            link_remap => "link-remap",
            force_irmap => "force-irmap",
            ext_sharing => "enable-external-sharing",
            ext_masters => "enable-external-masters",
            weak_sysctls => "weak-sysctls",
            lazy_pages => "lazy-pages",
            orphan_pts_master => "orphan-pts-master",
            tls => "tls",
            tls_no_cn_verify => "tls-no-cn-verify",
            mntns_compat_mode => "mntns-compat-mode",
            skip_file_rwx_check => "skip-file-rwx-check",
            unprivileged => "unprivileged",
            display_stats => "display-stats",
            manage_cgroups => "manage-cgroups",
        }
        let both = Opts {
            manage_cgroups: Some(true),
            manage_cgroups_mode: Some(0),
            ..Opts::default()
        };
        assert_eq!(added(both), "--manage-cgroups=ignore");
        let dump = words(
            Kind::Dump,
            Opts {
                pid: Some(12),
                ..Opts::default()
            },
        );
        assert!(dump.contains(&"--tree=12".to_owned()), "{dump:?}");
    }

    fn refused(opts: Opts, unknown: &[Unknown], words: &str) {
        let client = client(Mode::Service);
        let error = Words::of(&request(Kind::Restore, opts), unknown, &client).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }

    #[test]
    fn what_is_not_known_is_named() {
        let with = |change: &dyn Fn(&mut Opts)| {
            let mut opts = Opts::default();
            change(&mut opts);
            opts
        };
        refused(with(&|o| o.cpu_cap = Some(9)), &[], "cpu_cap: 0x8");
        refused(with(&|o| o.network_lock = Some(9)), &[], "network_lock: 9");
        refused(with(&|o| o.pre_dump_mode = Some(9)), &[], "pre_dump_mode");
        refused(with(&|o| o.manage_cgroups_mode = Some(9)), &[], "cgroups");
        refused(with(&|o| o.empty_ns = Some(1)), &[], "empty_ns: 0x1");
        refused(with(&|o| o.rst_sibling = Some(true)), &[], "rst_sibling");
        let unknown = |set| Unknown {
            name: "field 72 of opts".to_owned(),
            set,
        };
        refused(Opts::default(), &[unknown(true)], "field 72 of opts");
        let req = request(Kind::Restore, Opts::default());
        let words = Words::of(&req, &[unknown(false)], &client(Mode::Service)).unwrap();
        assert!(words.ignored[0].contains("field 72 of opts"));
    }
}
