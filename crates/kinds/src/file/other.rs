//! What no other kind carries: a plugin does, or it is refused by its name.

use freezeframe_error::{Result, SysExt};
use freezeframe_image::{RawRecord, Tag};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::{is_opath, shown};
use crate::plugin::{DeviceFile, Plugins, State, said_by};

/// See the module.
#[derive(Debug)]
pub struct Other;

static ABOUT: About = About {
    tag: Tag::new(*b"FOTH"),
    version: 1,
    name: "other",
    title: "Other descriptors",
    manual: "proc_pid_fd(5)",
    since: "",
    carried: "what a plugin (`Plugin` in the library) says it carries",
    refused: "all else: O_PATH descriptors of sockets (\"an O_PATH descriptor of a socket is not supported\"), io_uring, userfaultfd, bpf, perf_event, namespace files, other anonymous inodes by their names, /dev/net/tun (\"TUN/TAP (/dev/net/tun) is not supported\"), /dev/kvm and what comes from it, /dev/fuse, /dev/nvidia*, other devices by their numbers (\"character device 10:235 (/dev/autofs) is not supported\")",
    programs: &[
        "beyond::io_uring",
        "beyond::userfaultfd",
        "beyond::userfaultfd_device",
        "beyond::tun",
        "beyond::tap",
        "beyond::fuse",
        "beyond::kvm",
        "beyond::kvm_machine",
        "beyond::perf_event",
        "beyond::bpf_map",
        "beyond::bpf_map_mapped",
        "beyond::message_queue",
        "beyond::kmsg",
        "memory::secret",
    ],
    show: show::<State>,
};

impl FileKind for Other {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, _file: &FileView<'_>) -> bool {
        true
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        match carried_by(&cx.options.plugins, file)? {
            Some(state) => ABOUT.record(file.subject(), &state),
            None => Err(file.refuse(what(
                file.link,
                file.stat.mode,
                file.stat.rdev,
                is_opath(file),
            ))),
        }
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let state: State = ABOUT.decode(item.record)?;
            let plugin = state.plugin(&cx.options.plugins)?;
            let made = plugin.restore_file(&state.state);
            let made = made.map_err(|e| e.context(said_by(plugin.name())))?;
            cx.provide_ours(item.id, made);
            cx.set_flags_of_last();
        }
        Ok(())
    }
}

/// What a plugin says of it, if it is one's.
fn carried_by(plugins: &Plugins, file: &FileView<'_>) -> Result<Option<State>> {
    if plugins.is_empty() || is_opath(file) {
        return Ok(None);
    }
    let device = DeviceFile {
        pid: file.proc.pid.0,
        fd: file.fd,
        name: file.link,
        mode: file.stat.mode,
        rdev: file.stat.rdev,
        flags: file.info.flags,
        file: file.ours()?,
    };
    State::first(plugins, |plugin| plugin.dump_file(&device))
}

/// Anonymous inodes known by name: as in the link, and in words.
const ANONYMOUS: [(&str, &str); 14] = [
    ("[io_uring]", "io_uring"),
    ("[userfaultfd]", "userfaultfd"),
    ("[perf_event]", "a perf event"),
    ("bpf-map", "a BPF map (bpf)"),
    ("bpf-prog", "a BPF program (bpf)"),
    ("bpf_link", "a BPF link"),
    ("bpf-link", "a BPF link"),
    ("btf", "a BTF object"),
    ("kvm-vm", "a KVM virtual machine"),
    ("kvm-vcpu", "a KVM virtual CPU"),
    ("[fscontext]", "a file system context (fsopen)"),
    ("[landlock-ruleset]", "a Landlock ruleset"),
    ("seccomp notify", "a seccomp listener"),
    ("[secretmem]", "secret memory (memfd_secret)"),
];

/// File systems whose files are not what a path can give again, by their magic
/// numbers (statfs(2)).
const FILE_SYSTEMS: [(u64, &str); 4] = [
    (0x1980_0202, "a POSIX message queue (mqueue)"),
    (0x5345_434d, "secret memory (memfd_secret)"),
    (0x9584_58f6, "hugetlb memory"),
    (0xcafe_4a11, "a pinned BPF object (bpf)"),
];

/// Refuses files of such file systems, by name.
pub fn check_file_system(file: &FileView<'_>) -> Result<()> {
    let fs = nix::sys::statfs::fstatfs(file.ours()?)
        .sys("fstatfs")
        .map_err(|e| file.blame(e))?;
    let magic = fs.filesystem_type().0 as u64 & 0xffff_ffff;
    match FILE_SYSTEMS.iter().find(|(m, _)| *m == magic) {
        Some((_, words)) => Err(file.refuse(format!("{words} is not supported"))),
        None => Ok(()),
    }
}

/// Kinds of namespace, as links show them.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// The refusal, in words.
fn what(link: &[u8], mode: u32, rdev: u64, opath: bool) -> String {
    let link = shown(link);
    let name = match mode & libc::S_IFMT {
        libc::S_IFCHR => device(&link, libc::major(rdev), libc::minor(rdev)),
        libc::S_IFBLK => format!("block device {}:{}", libc::major(rdev), libc::minor(rdev)),
        libc::S_IFSOCK => "a socket".to_string(),
        libc::S_IFDIR => "a directory without a name".to_string(),
        _ => by_link(&link),
    };
    let opath = if opath {
        "an O_PATH descriptor of "
    } else {
        ""
    };
    format!("{opath}{name} is not supported")
}

/// Character devices known by their numbers (admin-guide/devices.txt; NVIDIA's use 195).
fn device(link: &str, major: u32, minor: u32) -> String {
    let what = match (major, minor) {
        (10, 200) => "TUN/TAP",
        (10, 229) => "FUSE",
        (10, 232) => "KVM",
        (10, 257) => "userfaultfd",
        (195, _) => "an NVIDIA device",
        _ => return format!("character device {major}:{minor} ({link})"),
    };
    format!("{what} ({link})")
}

fn by_link(link: &str) -> String {
    if let Some(rest) = link.strip_prefix("anon_inode:") {
        let known = ANONYMOUS.iter().find(|(n, _)| rest.starts_with(n));
        return known.map_or_else(
            || format!("anonymous inode {rest}"),
            |(_, words)| words.to_string(),
        );
    }
    if link.starts_with("/secretmem") {
        return "secret memory (memfd_secret)".to_string();
    }
    let (kind, _) = link.split_once(":[").unwrap_or((link, ""));
    if NAMESPACES.contains(&kind) {
        return format!("a descriptor of namespace {link}");
    }
    format!("a file shown as {link}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_called_by_its_name() {
        let anon = |link: &str| what(link.as_bytes(), 0o600, 0, false);
        assert_eq!(anon("anon_inode:[io_uring]"), "io_uring is not supported");
        assert_eq!(
            anon("anon_inode:bpf-map"),
            "a BPF map (bpf) is not supported"
        );
        assert_eq!(
            anon("anon_inode:kvm-vcpu:0"),
            "a KVM virtual CPU is not supported"
        );
        assert_eq!(
            anon("anon_inode:[new]"),
            "anonymous inode [new] is not supported"
        );
        assert_eq!(
            what(b"mnt:[4026531841]", libc::S_IFREG, 0, false),
            "a descriptor of namespace mnt:[4026531841] is not supported"
        );
        assert_eq!(
            what(b"/dev/fuse", libc::S_IFCHR, libc::makedev(10, 229), false),
            "FUSE (/dev/fuse) is not supported"
        );
        assert_eq!(
            what(b"/dev/nvidia0", libc::S_IFCHR, libc::makedev(195, 0), false),
            "an NVIDIA device (/dev/nvidia0) is not supported"
        );
        assert_eq!(
            what(b"/dev/autofs", libc::S_IFCHR, libc::makedev(10, 235), false),
            "character device 10:235 (/dev/autofs) is not supported"
        );
        assert_eq!(
            what(b"anon_inode:[eventfd]", 0o600, 0, true),
            "an O_PATH descriptor of anonymous inode [eventfd] is not supported"
        );
        assert_eq!(
            what(b"/dev/sda", libc::S_IFBLK, libc::makedev(8, 0), false),
            "block device 8:0 is not supported"
        );
    }
}
