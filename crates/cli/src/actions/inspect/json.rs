//! For machines.

use freezeframe::Result;
use freezeframe_kinds::model::{Life, Process, Vma};
use freezeframe_kinds::{FileId, registry};
use serde_json::{Map, Value, json};

use super::{Shown, composition};

/// The whole image, but for its pages.
pub(super) fn value(shown: &Shown) -> Result<Value> {
    let loaded = &shown.loaded;
    let header = loaded.image.header();
    let tree = &loaded.tree;
    let total = shown.total();
    Ok(json!({
        "ok": true,
        "action": "inspect",
        "image": {
            "id": header.image_id.to_string(),
            "format_version": header.format_version,
            "created_ns": header.created,
            "kernel": header.kernel_release,
            "arch": header.arch,
            "page_size": header.page_size,
            "stored": total.stored,
            "zero": total.zero,
            "same": total.same,
            "parent": total.parent,
        },
        "composition": composition::value(&composition::parts(shown)),
        "root": tree.root,
        "shell_job": tree.shell_job,
        "processes": loaded.procs.iter().map(|p| process(shown, p)).collect::<Result<Vec<_>>>()?,
        "files": loaded.files.keys().map(|id| file(shown, *id)).collect::<Result<Vec<_>>>()?,
    }))
}

fn process(shown: &Shown, p: &Process) -> Result<Value> {
    let loaded = &shown.loaded;
    let (state, status) = match p.life {
        Life::Alive => ("alive", None),
        Life::Stopped(signal) => ("stopped", Some(signal)),
        Life::Zombie(status) => ("zombie", Some(status)),
    };
    let vmas = loaded
        .spaces
        .get(&p.mm)
        .map(|space| space.vmas.as_slice())
        .unwrap_or_default();
    let fds = loaded
        .tables
        .get(&p.pid())
        .map(|table| table.fds.as_slice())
        .unwrap_or_default();
    let threads = p
        .threads
        .iter()
        .map(|tid| Ok(json!({"tid": tid, "attributes": attributes(shown, *tid)?})));
    Ok(json!({
        "pid": p.pid(),
        "pids": p.pids,
        "ppid": p.ppid,
        "pgid": p.pgid,
        "sid": p.sid,
        "comm": p.comm,
        "state": state,
        "signal_or_status": status,
        "exit_signal": p.exit_signal,
        "threads": threads.collect::<Result<Vec<_>>>()?,
        "vmas": vmas.iter().map(|v| vma(shown, p.mm, v)).collect::<Vec<_>>(),
        "descriptors": fds.iter().map(|e| json!({"fd": e.fd, "cloexec": e.cloexec, "file": e.file.0})).collect::<Vec<_>>(),
    }))
}

/// The first thread has its process's too: they share the subject.
fn attributes(shown: &Shown, id: i32) -> Result<Value> {
    let mut map = Map::new();
    for (about, record) in shown.attributes(id) {
        map.insert(about.name.to_owned(), Shown::record(about, record)?);
    }
    Ok(Value::Object(map))
}

fn vma(shown: &Shown, mm: u64, v: &Vma) -> Value {
    let stats = shown.stats(mm, v);
    json!({
        "start": v.start,
        "end": v.end,
        "prot": v.prot,
        "shared": v.shared,
        "offset": v.offset,
        "kind": registry::memory(v.kind).map(|k| k.about().name),
        "object": v.object.0,
        "name": v.name,
        "stored": stats.stored,
        "zero": stats.zero,
        "same": stats.same,
        "parent": stats.parent,
    })
}

fn file(shown: &Shown, id: FileId) -> Result<Value> {
    let file = &shown.loaded.files[&id];
    let kind = registry::file(file.kind).map(|k| k.about());
    let record = match kind {
        Some(about) => Shown::record(about, shown.loaded.file_record(id)?)?,
        None => Value::Null,
    };
    Ok(json!({
        "id": id.0,
        "kind": kind.map(|about| about.name),
        "name": file.name,
        "flags": file.flags,
        "pos": file.pos,
        "record": record,
    }))
}
