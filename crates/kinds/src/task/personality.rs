//! The execution domain of a thread (personality(2)): ADDR_NO_RANDOMIZE and the like.
//!
//! Read and set by personality(2) inside the thread. Set when the memory is mapped already, so READ_IMPLIES_EXEC changes no mapping.

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Batch, Replies};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Personality;

static ABOUT: About = About {
    tag: Tag::new(*b"PERS"),
    version: 1,
    name: "personality",
    title: "Personality",
    manual: "personality(2)",
    since: "",
    carried: "the flags of each thread",
    refused: "",
    programs: &["process::personality", "many::attributes"],
    show: show::<Record>,
};

/// The argument that changes nothing.
const ASK: u32 = u32::MAX;

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    persona: u32,
}

impl TaskKind for Personality {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Attributes
    }
    fn ask(&self, task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        if task.fields.is_some() {
            return Ok(Asked::default());
        }
        let op = batch.call("personality", libc::SYS_personality, [ASK.into()]);
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
        let persona = match task.fields {
            Some(fields) => fields.personality,
            None => replies.raw(asked.ops[0]) as u32,
        };
        Ok(Some(ABOUT.record(task.subject(), &Record { persona })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        if record.persona == ASK {
            return Err(Error::corrupt("a personality of all ones").on_task(task.tid.0));
        }
        task.batch.call(
            "personality",
            libc::SYS_personality,
            [record.persona.into()],
        );
        Ok(())
    }
}
