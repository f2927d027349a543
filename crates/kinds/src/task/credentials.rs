//! User and group ids, groups, capabilities, securebits and no_new_privs of a thread.
//!
//! Ids, capabilities and no_new_privs are read from /proc/PID/task/TID/status; the securebits
//! (SECBIT_KEEP_CAPS among them) only the thread itself can ask. The kernel keeps all of them per thread, and raw calls set them so.
//!
//! The order in which they are set, each step with the rights that the next one needs:
//! inheritable capabilities as far as the bounding set is to lose them, bounding set, groups, group ids, `SECBIT_NO_SETUID_FIXUP`, so that
//! a change of ids leaves the capabilities alone, user ids, ambient capabilities,
//! the securebits that are wanted, the capabilities that are wanted, no_new_privs.

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use freezeframe_sys::proc::ProcDir;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Credentials;

static ABOUT: About = About {
    tag: Tag::new(*b"CRED"),
    version: 1,
    name: "credentials",
    title: "Credentials",
    manual: "credentials(7), capabilities(7), PR_SET_NO_NEW_PRIVS(2const)",
    since: "",
    carried: "real, effective, saved and filesystem ids, groups, five capability sets, securebits, no_new_privs, per thread",
    refused: "capabilities the restorer itself lacks (named); keyrings",
    programs: &[
        "credentials::users_and_groups",
        "credentials::plain_user",
        "credentials::no_new_privs_user",
        "credentials::threads_differ",
        "credentials::capabilities",
        "credentials::capabilities_of_threads",
        "credentials::securebits",
        "credentials::no_new_privs",
        "credentials::user_with_capability",
        "many::attributes",
    ],
    show: show::<Record>,
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Real, effective, saved, filesystem.
    uids: [u32; 4],
    gids: [u32; 4],
    groups: Vec<u32>,
    inheritable: u64,
    permitted: u64,
    effective: u64,
    bounding: u64,
    ambient: u64,
    /// `SECBIT_*`
    securebits: u32,
    no_new_privs: bool,
}

/// Names by bit, without `CAP_`.
const CAPS: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
/// `SECBIT_NO_SETUID_FIXUP`
const NO_SETUID_FIXUP: u32 = 1 << 2;
/// `PR_CAP_AMBIENT_RAISE`, `PR_CAP_AMBIENT_CLEAR_ALL`
const AMBIENT_RAISE: u64 = 2;
const AMBIENT_CLEAR_ALL: u64 = 4;
/// `_LINUX_CAPABILITY_VERSION_3`
const CAP_VERSION: u32 = 0x2008_0522;
/// Numbers of capabilities that setting credentials takes.
const SETGID: u32 = 6;
const SETUID: u32 = 7;
const SETPCAP: u32 = 8;
/// `NGROUPS_MAX`
const MAX_GROUPS: usize = 65536;

/// What the thread has before it is given its credentials.
struct Own {
    uids: [u32; 4],
    gids: [u32; 4],
    groups: Vec<u32>,
    permitted: u64,
    effective: u64,
    bounding: u64,
}

impl Own {
    fn of(task: &RestoreTask<'_>) -> Result<Own> {
        let status = ProcDir::open(task.pid)?.task(task.tid)?.status()?;
        Ok(Own {
            uids: status.uids,
            gids: status.gids,
            groups: status.groups,
            permitted: status.cap_prm,
            effective: status.cap_eff,
            bounding: status.cap_bnd,
        })
    }

    /// Whether it is a plain user's: what is as it is to be is left alone then.
    fn is_plain(&self) -> bool {
        self.effective & (1 << SETPCAP | 1 << SETUID | 1 << SETGID)
            != 1 << SETPCAP | 1 << SETUID | 1 << SETGID
    }
}

/// The capabilities of a set, for people.
fn names(set: u64) -> String {
    let names = (0..64)
        .filter(|i| set & (1 << i) != 0)
        .map(|i| match CAPS.get(i) {
            Some(name) => format!("CAP_{name}"),
            None => format!("capability {i}"),
        });
    names.collect::<Vec<_>>().join(", ")
}

fn capset(
    batch: &mut Batch,
    label: &'static str,
    effective: u64,
    permitted: u64,
    inheritable: u64,
) {
    let mut header = CAP_VERSION.to_le_bytes().to_vec();
    header.extend(0u32.to_le_bytes());
    let header = batch.data(&header);
    // Two of struct __user_cap_data_struct: the low halves, then the high ones.
    let mut data = Vec::new();
    for shift in [0, 32] {
        for set in [effective, permitted, inheritable] {
            data.extend(((set >> shift) as u32).to_le_bytes());
        }
    }
    let data = batch.data(&data);
    batch.call(label, libc::SYS_capset, [header.into(), data.into()]);
}

impl Record {
    /// The calls that set it, in their order.
    fn set(&self, batch: &mut Batch, own: Option<&Own>) {
        let plain = own.filter(|own| own.is_plain());
        let prctl = |batch: &mut Batch, label: String, option: i32, args: [u64; 4]| {
            let args = [
                option.into(),
                args[0].into(),
                args[1].into(),
                args[2].into(),
                args[3].into(),
            ];
            batch.call(label, libc::SYS_prctl, args)
        };
        prctl(
            batch,
            "prctl(PR_CAP_AMBIENT_CLEAR_ALL)".to_string(),
            libc::PR_CAP_AMBIENT,
            [AMBIENT_CLEAR_ALL, 0, 0, 0],
        );
        if let Some(own) = own
            && (self.inheritable & !self.bounding != 0 || self.ambient != 0)
        {
            // What is raised in inheritable must be in the bounding set; ambient ones in both.
            capset(
                batch,
                "capset(inheritable)",
                own.effective,
                own.permitted,
                self.inheritable,
            );
        }
        for (cap, name) in CAPS
            .iter()
            .enumerate()
            .filter(|(i, _)| self.bounding & (1 << i) == 0)
            .filter(|(i, _)| plain.is_none_or(|own| own.bounding & (1 << i) != 0))
        {
            prctl(
                batch,
                format!("prctl(PR_CAPBSET_DROP, CAP_{name})"),
                libc::PR_CAPBSET_DROP,
                [cap as u64, 0, 0, 0],
            );
        }
        if plain.is_none_or(|own| own.groups != self.groups) {
            let groups: Vec<u8> = self.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
            let groups = batch.data(&groups);
            batch.call(
                "setgroups",
                libc::SYS_setgroups,
                [self.groups.len().into(), groups.into()],
            );
        }
        let [real, effective, saved, fs] = self.gids;
        batch.call(
            "setresgid",
            libc::SYS_setresgid,
            [real, effective, saved].map(Arg::from),
        );
        set_fs_id(batch, "setfsgid", libc::SYS_setfsgid, fs);
        let bits = |batch: &mut Batch, bits: u32| {
            prctl(
                batch,
                format!("prctl(PR_SET_SECUREBITS, {bits:#x})"),
                libc::PR_SET_SECUREBITS,
                [bits.into(), 0, 0, 0],
            );
        };
        // Only a change of ids takes capabilities away.
        let same_ids = plain.is_some_and(|own| own.uids == self.uids);
        if !same_ids {
            bits(batch, NO_SETUID_FIXUP);
        }
        let [real, effective, saved, fs] = self.uids;
        batch.call(
            "setresuid",
            libc::SYS_setresuid,
            [real, effective, saved].map(Arg::from),
        );
        set_fs_id(batch, "setfsuid", libc::SYS_setfsuid, fs);
        for cap in (0..64).filter(|i| self.ambient & (1 << i) != 0) {
            let args = [AMBIENT_RAISE, cap, 0, 0];
            prctl(
                batch,
                format!("prctl(PR_CAP_AMBIENT_RAISE, {cap})"),
                libc::PR_CAP_AMBIENT,
                args,
            );
        }
        if same_ids {
            let option = libc::PR_GET_SECUREBITS.into();
            let op = batch.call("prctl(PR_GET_SECUREBITS)", libc::SYS_prctl, [option]);
            batch.expect(op, self.securebits.into());
        } else {
            bits(batch, self.securebits);
        }
        capset(
            batch,
            "capset",
            self.effective,
            self.permitted,
            self.inheritable,
        );
        if self.no_new_privs {
            let args = [1, 0, 0, 0];
            prctl(
                batch,
                "prctl(PR_SET_NO_NEW_PRIVS)".to_string(),
                libc::PR_SET_NO_NEW_PRIVS,
                args,
            );
        }
    }
}

impl Record {
    /// The capabilities that it takes to become this and that a plain user lacks.
    fn takes(&self, own: &Own) -> u64 {
        let foreign = |wanted: &[u32; 4], own: &[u32; 4]| wanted.iter().any(|id| !own.contains(id));
        let mut takes = 0;
        if self.groups != own.groups || foreign(&self.gids, &own.gids) {
            takes |= 1 << SETGID;
        }
        if foreign(&self.uids, &own.uids) {
            takes |= 1 << SETUID;
        }
        // To give up a capability of the bounding set, and to keep the others over a change of ids.
        if own.bounding & !self.bounding != 0 || self.uids != own.uids {
            takes |= 1 << SETPCAP;
        }
        takes & !own.effective
    }
}

/// These calls give back the id there was before, and no error: so they are asked again, with an id that is none.
fn set_fs_id(batch: &mut Batch, label: &'static str, nr: i64, id: u32) {
    let op = batch.call(label, nr, [id.into()]);
    batch.may_fail(op);
    let op = batch.call(label, nr, [u32::MAX.into()]);
    batch.expect(op, i64::from(id));
}

impl TaskKind for Credentials {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Credentials
    }
    fn ask(&self, task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        if task.fields.is_some() {
            return Ok(Asked::default());
        }
        let op = batch.call(
            "prctl(PR_GET_SECUREBITS)",
            libc::SYS_prctl,
            [libc::PR_GET_SECUREBITS.into()],
        );
        Ok(Asked {
            ops: vec![op],
            data: Vec::new(),
            ..Asked::default()
        })
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        asked: &Asked,
        replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let status = task.status;
        let record = Record {
            uids: status.uids,
            gids: status.gids,
            groups: status.groups.clone(),
            inheritable: status.cap_inh,
            permitted: status.cap_prm,
            effective: status.cap_eff,
            bounding: status.cap_bnd,
            ambient: status.cap_amb,
            securebits: match task.fields {
                Some(fields) => fields.securebits,
                None => replies.raw(asked.ops[0]) as u32,
            },
            no_new_privs: status.no_new_privs,
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        if record.groups.len() > MAX_GROUPS {
            return Err(Error::corrupt("there are too many groups").on_task(task.tid.0));
        }
        // Threads are made as their leader; what the kernel refuses to one of them names its call.
        let plain = !nix::unistd::geteuid().is_root();
        let raises = record.inheritable & !record.bounding != 0 || record.ambient != 0;
        let own = (task.leader || plain || raises).then(|| Own::of(task));
        let own = own.transpose()?;
        if let (Some(own), true) = (&own, task.leader) {
            let lacking =
                (record.permitted | record.effective | record.inheritable | record.ambient)
                    & !own.permitted
                    | record.takes(own);
            if lacking != 0 {
                return Err(Error::new(
                    Kind::Permission,
                    format!("the restorer lacks {}", names(lacking)),
                )
                .on_task(task.pid.0));
            }
            let lacking = record.bounding & !own.bounding;
            if lacking != 0 {
                task.warnings.push(format!(
                    "pid {}: its capability bounding set loses {}, which the restorer's lacks",
                    task.pid,
                    names(lacking)
                ));
            }
        }
        record.set(task.batch, own.as_ref());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(record: &Record, own: Option<&Own>) -> Vec<String> {
        let mut batch = Batch::new();
        record.set(&mut batch, own);
        batch.ops().map(|op| batch.label(op).to_string()).collect()
    }

    fn root() -> Own {
        Own {
            uids: [0; 4],
            gids: [0; 4],
            groups: Vec::new(),
            permitted: u64::MAX,
            effective: u64::MAX,
            bounding: u64::MAX,
        }
    }

    /// A plain user becomes itself without any capability, and anything else not at all.
    #[test]
    fn what_is_right_already_takes_no_right() {
        let record = nobody();
        let own = Own {
            uids: record.uids,
            gids: record.gids,
            groups: record.groups.clone(),
            permitted: 0,
            effective: 0,
            bounding: u64::MAX >> 23,
        };
        assert_eq!(record.takes(&own), 0);
        let calls = labels(&record, Some(&own)).join(" ");
        for forbidden in ["PR_CAPBSET_DROP", "setgroups", "PR_SET_SECUREBITS"] {
            assert!(!calls.contains(forbidden), "{calls}");
        }
        let other = |change: fn(&mut Record)| {
            let mut record = nobody();
            change(&mut record);
            names(record.takes(&own))
        };
        assert_eq!(other(|r| r.groups.clear()), "CAP_SETGID");
        assert_eq!(other(|r| r.gids[1] = 0), "CAP_SETGID");
        assert_eq!(other(|r| r.bounding = 0), "CAP_SETPCAP");
        assert_eq!(other(|r| r.uids = [0; 4]), "CAP_SETUID, CAP_SETPCAP");
    }

    fn nobody() -> Record {
        Record {
            uids: [65534; 4],
            gids: [65534; 4],
            groups: vec![7, 8],
            inheritable: 0,
            permitted: 0,
            effective: 0,
            bounding: u64::MAX,
            ambient: 0,
            securebits: 0,
            no_new_privs: true,
        }
    }

    #[test]
    fn each_step_keeps_the_rights_of_the_next() {
        let record = Record {
            bounding: !(1 << 21),
            ..nobody()
        };
        let labels = labels(&record, None);
        let at = |what: &str| labels.iter().position(|l| l.starts_with(what)).expect(what);
        assert!(at("prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN)") < at("setresuid"));
        assert!(at("setgroups") < at("setresgid"));
        assert!(at("setresgid") < at("setresuid"));
        assert!(at("prctl(PR_SET_SECUREBITS, 0x4)") < at("setresuid"));
        assert!(at("setresuid") < at("prctl(PR_SET_SECUREBITS, 0x0)"));
        assert!(at("prctl(PR_SET_SECUREBITS, 0x0)") < at("capset"));
        assert!(at("capset") < at("prctl(PR_SET_NO_NEW_PRIVS)"));
    }

    #[test]
    fn what_the_bounding_set_loses_is_made_inheritable_before() {
        let record = Record {
            inheritable: 1 << 12,
            bounding: 0,
            ambient: 1 << 12,
            permitted: 1 << 12,
            ..nobody()
        };
        let labels = labels(&record, Some(&root()));
        let at = |what: &str| labels.iter().position(|l| l == what).expect(what);
        assert!(at("capset(inheritable)") < at("prctl(PR_CAPBSET_DROP, CAP_NET_ADMIN)"));
        assert!(at("setfsuid") < at("prctl(PR_CAP_AMBIENT_RAISE, 12)"));
    }

    #[test]
    fn capabilities_have_names() {
        assert_eq!(
            names(1 | 1 << 21 | 1 << 40),
            "CAP_CHOWN, CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE"
        );
        assert_eq!(names(1 << 50), "capability 50");
    }
}
