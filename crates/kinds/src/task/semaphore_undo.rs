//! System V semaphores: what a process does to them when it ends (SEM_UNDO).
//!
//! The kernel takes back at the end of a process what it did with SEM_UNDO: the adjustments, a
//! number for each semaphore, which no call tells. But semop(2) does all its operations or
//! none, and refuses those that would bring an adjustment out of its range (ERANGE). So the
//! task itself is let ask for operations of which the last can never be done (EAGAIN), and which of the two
//! errors comes tells whether the adjustment is greater than a number that we choose. Nothing
//! changes by it: neither values, nor adjustments, nor who was the last, nor when.
//! It is asked of tasks that have a list of adjustments (kcmp(2)), which threads of pthread_create(3) always have.
//!
//! In our IPC namespace the end of the tree undoes its part, as it does at any end. A restored
//! process does the same again: all that give first, then those that take, which wait
//! a little for the others. So whoever came in between has it, as with file
//! locks. In a namespace of the tree's own the values are made anew as they were,
//! and each adjustment comes by two operations at once that leave its value alone.
//!
//! # References
//! semop(2), proc_sysvipc_sem(5), `perform_atomic_semop` in the kernel's ipc/sem.c

use std::collections::BTreeMap;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Batch, Replies};
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::kcmp::{KcmpType, kcmp};
use freezeframe_sys::{ipc, sysv};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, AsksOn, DumpCx, RestoreTask, Scope, Stage, Stopped, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct SemaphoreUndo;

static ABOUT: About = About {
    tag: Tag::new(*b"SEMU"),
    version: 1,
    name: "semaphore-undo",
    title: "System V semaphores and message queues",
    manual: "semop(2)",
    since: "",
    carried: "of our IPC namespace, as with CRIU, they stay as they are, the tree killed or not; who waits for one goes on waiting after a restore. What a process is to undo at its end (SEM_UNDO): undone when a dump ends it, and done again by the restore, if within two seconds nobody else is in the way. Those of a namespace of the tree: see there",
    refused: "adjustments of a thread that does not share those of its process, or shared by processes (\"semaphore adjustments (SEM_UNDO) ... are not supported\"), more than a semaphore can take at the end, and those to semaphores that the process may no longer use, if the tree was the last that did (otherwise that is a warning)",
    programs: &[
        "sysv::semaphores",
        "sysv::semaphore_undo",
        "sysv::semaphore_undo_of_thread",
        "sysv::message_queue",
        "ipcns::semaphore_undo",
    ],
    show: show::<Record>,
};

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Record(Vec<Adjusted>);

/// The adjustment of one semaphore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Adjusted {
    id: i32,
    number: u16,
    /// What the end of the process adds.
    by: i16,
    /// The value that is there already, if the semaphore was made anew.
    value: Option<u16>,
}

/// What the processes of a tree are to undo.
#[derive(Debug, Default)]
pub struct Adjustments(BTreeMap<Pid, Record>);

/// SEMVMX
const MOST: i32 = 32767;
const UNDO: i16 = 0x1000;
const NOWAIT: i16 = libc::IPC_NOWAIT as i16;
/// What a batch asks at most.
const AT_ONCE: usize = 100;
/// How often it is asked of semaphores that others change meanwhile.
const ATTEMPTS: usize = 20;
/// How long a restored process waits for others: seconds.
const PATIENCE: i64 = 2;

/// struct sembuf: number, operation, flags.
type Operation = (u16, i16, i16);

fn bytes(operations: &[Operation]) -> Vec<u8> {
    let word = |(number, by, flags): &Operation| {
        [number.to_ne_bytes(), by.to_ne_bytes(), flags.to_ne_bytes()].concat()
    };
    operations.iter().flat_map(word).collect()
}

/// A step that fits, of `left`.
fn step(left: i32, most: i32) -> i16 {
    left.min(most) as i16
}

/// Operations on a semaphore of this value that fail: with ERANGE if the
/// adjustment is greater than `than`, with EAGAIN if not.
fn question(number: u16, value: u16, than: i16) -> Vec<Operation> {
    let mut operations = Vec::new();
    if i32::from(value) < MOST {
        operations.push((number, (MOST - i32::from(value)) as i16, NOWAIT));
    }
    let mut left = MOST - i32::from(than);
    while left > 0 {
        let by = step(left, MOST);
        operations.extend([(number, -by, UNDO | NOWAIT), (number, by, NOWAIT)]);
        left -= i32::from(by);
    }
    operations.push((number, i16::MIN, NOWAIT));
    operations
}

/// Operations that leave the value alone, and the adjustment where it was.
fn neutral(number: u16, value: u16, by: i16) -> Vec<Operation> {
    let (down, up) = (i32::from(value), MOST - i32::from(value));
    let (mut operations, mut left) = (Vec::new(), i32::from(by).abs());
    while left > 0 {
        let much = step(left, down.max(up));
        // What is undone later has the other sign.
        let kept = if by > 0 { -much } else { much };
        let both = [(number, kept, UNDO | NOWAIT), (number, -kept, NOWAIT)];
        match (kept > 0) == (up >= down) {
            true => operations.extend(both),
            false => operations.extend([both[1], both[0]]),
        }
        left -= i32::from(much);
    }
    operations
}

/// Operations that do again what the end of the process has undone.
fn again(number: u16, by: i16) -> Vec<Operation> {
    let (mut operations, mut left) = (Vec::new(), i32::from(by).abs());
    while left > 0 {
        let much = step(left, MOST);
        operations.push((number, if by > 0 { -much } else { much }, UNDO));
        left -= i32::from(much);
    }
    operations
}

/// One semaphore, and between what its adjustment is.
#[derive(Clone, Copy, Debug)]
struct Search {
    id: i32,
    number: u16,
    low: i16,
    high: i16,
}

impl Search {
    fn known(&self) -> bool {
        self.low == self.high
    }
    /// The answers contradict each other.
    fn is_wrong(&self) -> bool {
        self.low > self.high
    }
    fn middle(&self) -> i16 {
        ((i32::from(self.low) + i32::from(self.high)) >> 1) as i16
    }
    fn learn(&mut self, than: i16, greater: bool) {
        match greater {
            true => self.low = self.low.max(than.saturating_add(1)),
            false => self.high = self.high.min(than),
        }
    }
}

/// The values of all sets there are.
type Values = BTreeMap<i32, Vec<u16>>;

fn values(ids: &[i32]) -> Result<Values> {
    let mut all = Values::new();
    for id in ids {
        match ipc::semaphores(*id) {
            Ok(set) => drop(all.insert(*id, set.values)),
            Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EIDRM)) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

/// Asks a task; nothing where it may not use the semaphore.
fn ask(
    cx: &DumpCx<'_>,
    tree: &mut dyn Stopped,
    tid: Tid,
    questions: &[(Search, i16)],
) -> Result<Vec<Option<bool>>> {
    let mut ids: Vec<i32> = questions.iter().map(|(s, _)| s.id).collect();
    ids.dedup();
    for _ in 0..ATTEMPTS {
        let before = cx.ipc.inside(|| values(&ids))?;
        let mut batch = Batch::new();
        let mut calls = Vec::new();
        for (search, than) in questions {
            let value = before
                .get(&search.id)
                .and_then(|v| v.get(usize::from(search.number)));
            calls.push(value.map(|value| {
                let operations = question(search.number, *value, *than);
                let place = batch.data(&bytes(&operations));
                let args = [search.id.into(), place.into(), operations.len().into()];
                let call = batch.call("semop", libc::SYS_semop, args);
                batch.may_fail(call)
            }));
        }
        let replies = tree.run(tid, &batch)?;
        if cx.ipc.inside(|| values(&ids))? != before {
            continue;
        }
        let answer = |call: Option<_>| match replies.result(call?) {
            Err(libc::ERANGE) => Some(true),
            Err(libc::EAGAIN) => Some(false),
            _ => None,
        };
        return Ok(calls.into_iter().map(answer).collect());
    }
    Err(changing())
}

/// The adjustments of a task that are not 0; and the sets of which it cannot be asked.
fn adjustments(
    cx: &DumpCx<'_>,
    tree: &mut dyn Stopped,
    tid: Tid,
    all: Vec<Search>,
) -> Result<(Vec<Search>, Vec<i32>)> {
    let (mut found, mut silent) = (Vec::new(), Vec::new());
    let mut more = |searches: &mut Vec<Search>, than: &dyn Fn(&Search) -> i16| -> Result<()> {
        let mut left = Vec::new();
        for part in searches.chunks(AT_ONCE) {
            let questions: Vec<_> = part.iter().map(|s| (*s, than(s))).collect();
            let answers = ask(cx, tree, tid, &questions)?;
            for ((mut search, than), answer) in questions.into_iter().zip(answers) {
                match answer {
                    Some(greater) => {
                        search.learn(than, greater);
                        if search.is_wrong() {
                            return Err(changing());
                        }
                    }
                    None => {
                        silent.push(search.id);
                        continue;
                    }
                }
                left.push(search);
            }
        }
        *searches = left;
        Ok(())
    };
    let mut searches = all;
    // Nearly all are 0.
    more(&mut searches, &|_| 0)?;
    more(&mut searches, &|_| -1)?;
    searches.retain(|s| (s.low, s.high) != (0, 0));
    while !searches.is_empty() {
        more(&mut searches, &Search::middle)?;
        found.extend(searches.iter().filter(|s| s.known()));
        searches.retain(|s| !s.known());
    }
    // Once more: a value that others change and change back may have misled us.
    let mut sure = found.clone();
    more(&mut sure, &|s| s.low)?;
    more(&mut sure, &|s| s.low.saturating_sub(1))?;
    match sure.iter().all(Search::known) {
        true => Ok((found, silent)),
        false => Err(changing()),
    }
}

fn changing() -> Error {
    Error::new(
        Kind::TargetBusy,
        "System V semaphores change all the time: try again",
    )
}

/// Tasks with the same list, each by all of them.
fn lists(tids: &[Tid]) -> Result<Vec<Vec<Tid>>> {
    let mut lists: Vec<Vec<Tid>> = Vec::new();
    'tasks: for tid in tids {
        for list in lists.iter_mut().rev() {
            if kcmp(list[0], *tid, KcmpType::SysvSem, 0, 0)?.is_eq() {
                list.push(*tid);
                continue 'tasks;
            }
        }
        lists.push(vec![*tid]);
    }
    Ok(lists)
}

impl AsksOn for SemaphoreUndo {
    fn ask_on(&self, cx: &mut DumpCx<'_>, tree: &mut dyn Stopped) -> Result<()> {
        let sets = cx.ipc.inside(sysv::used_semaphores)?;
        if sets.is_empty() {
            return Ok(());
        }
        let tids: Vec<_> = cx.procs.iter().flat_map(|p| p.tids.clone()).collect();
        let ids: Vec<i32> = sets.iter().map(|s| s.id).collect();
        let known = cx.ipc.inside(|| values(&ids))?;
        let of_set = |(id, values): (&i32, &Vec<u16>)| {
            let (id, low, high) = (*id, i16::MIN, i16::MAX);
            let search = move |number| Search {
                id,
                number,
                low,
                high,
            };
            (0..values.len() as u16).map(search).collect::<Vec<_>>()
        };
        let all: Vec<Search> = known.iter().flat_map(of_set).collect();
        for list in lists(&sysv::with_undo_lists(&tids)?)? {
            let first = list[0];
            let (found, silent) = adjustments(cx, tree, first, all.clone()).on_task(first.0)?;
            if let Some(id) = silent.first() {
                may_not_ask(cx, &sets, first, *id)?;
            }
            if !found.is_empty() {
                let pid = owner(cx, &list)?;
                let own = !cx.ipc.is_ours();
                let record = found.iter().map(|s| Adjusted {
                    id: s.id,
                    number: s.number,
                    by: s.low,
                    value: own.then(|| known[&s.id][usize::from(s.number)]),
                });
                let record = Record(record.collect());
                cx.adjustments.0.insert(pid, record);
            }
        }
        if cx.ipc.is_ours() {
            fits(&cx.adjustments, &known)?;
        }
        Ok(())
    }
}

/// Of semaphores that a task may not use, or no longer: a refusal, or a warning.
fn may_not_ask(
    cx: &mut DumpCx<'_>,
    sets: &[sysv::UsedSemaphores],
    tid: Tid,
    id: i32,
) -> Result<()> {
    let of_tree = |pid: &Pid| cx.proc(*pid).is_some();
    if sets
        .iter()
        .any(|s| s.id == id && s.last.iter().any(of_tree))
    {
        return Err(Error::unsupported(
            "it may have to undo what it did to System V semaphores (SEM_UNDO), which it may not use any more: not supported",
        )
        .on(format!("semaphores {id}"))
        .on_task(tid.0));
    }
    cx.warnings.push(format!(
        "System V semaphores {id} are not for task {tid} to use: if it has adjustments to them (SEM_UNDO) they are lost, which cannot be told"
    ));
    Ok(())
}

/// The process whose threads have this list.
fn owner(cx: &DumpCx<'_>, list: &[Tid]) -> Result<Pid> {
    let refused = |what: &str| {
        let what = format!("semaphore adjustments (SEM_UNDO) {what} are not supported");
        Err(Error::unsupported(what).on_task(list[0].0))
    };
    let with = |tid: &Tid| cx.procs.iter().find(|p| p.tids.contains(tid));
    let Some(proc) = with(&list[0]) else {
        return Err(Error::bug("a task without a process"));
    };
    if !list.iter().all(|tid| proc.tids.contains(tid)) {
        return refused("that several processes share");
    }
    if !list.contains(&proc.pid.leader()) {
        return refused("of a thread that does not share those of its process");
    }
    Ok(proc.pid)
}

/// Refuses adjustments of which a value would lose a part, in whatever order processes end.
fn fits(adjustments: &Adjustments, known: &Values) -> Result<()> {
    let mut sums: BTreeMap<(i32, u16), (i32, i32)> = BTreeMap::new();
    for (pid, adjusted) in adjustments
        .0
        .iter()
        .flat_map(|(p, r)| r.0.iter().map(move |a| (p, a)))
    {
        let sum = sums.entry((adjusted.id, adjusted.number)).or_default();
        sum.0 += i32::from(adjusted.by.min(0));
        sum.1 += i32::from(adjusted.by.max(0));
        let value = i32::from(known[&adjusted.id][usize::from(adjusted.number)]);
        if value + sum.0 < 0 || value + sum.1 > MOST {
            return Err(Error::unsupported(
                "semaphore adjustments (SEM_UNDO) beyond what the semaphore can take are not supported",
            )
            .on(format!("semaphores {}", adjusted.id))
            .on_task(pid.0));
        }
    }
    Ok(())
}

impl TaskKind for SemaphoreUndo {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::Thread
    }
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let found = cx.adjustments.0.get(&task.proc.pid);
        found
            .map(|found| ABOUT.record(task.subject(), found))
            .transpose()
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        let mut calls: Vec<(i32, Vec<Operation>)> = Vec::new();
        // Who takes may wait for who gives.
        for taking in [false, true] {
            for one in record.0.iter().filter(|one| (one.by > 0) == taking) {
                calls.push((
                    one.id,
                    match one.value {
                        Some(value) if i32::from(value) > MOST => {
                            return Err(Error::corrupt("a semaphore with a value that cannot be"));
                        }
                        Some(value) => neutral(one.number, value, one.by),
                        None => again(one.number, one.by),
                    },
                ));
            }
        }
        let patience = [PATIENCE.to_ne_bytes(), 0i64.to_ne_bytes()].concat();
        let patience = task.batch.data(&patience);
        for (id, operations) in calls {
            let place = task.batch.data(&bytes(&operations));
            let args = [
                id.into(),
                place.into(),
                operations.len().into(),
                patience.into(),
            ];
            let label = format!("semtimedop (System V semaphores {id}, which may be in use)");
            task.batch.call(label, libc::SYS_semtimedop, args);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What semop(2) does: the new value and adjustment, or none.
    fn perform(operations: &[Operation], mut value: i32, mut by: i32) -> Option<(i32, i32)> {
        for (_, op, flags) in operations {
            let op = i32::from(*op);
            value += op;
            if flags & UNDO != 0 {
                by -= op;
            }
            let inside = i32::from(i16::MIN)..=MOST;
            if op == 0 || !(0..=MOST).contains(&value) || !inside.contains(&by) {
                return None;
            }
        }
        Some((value, by))
    }

    #[test]
    fn adjustments_come_back() {
        for value in [0u16, 1, 5, 16383, 16384, 20_000, 32766, 32767] {
            for by in [
                i16::MIN,
                -32767,
                -20_000,
                -5,
                -1,
                1,
                4,
                16384,
                20_000,
                i16::MAX,
            ] {
                let after = perform(&neutral(3, value, by), value.into(), 0);
                assert_eq!(after, Some((value.into(), by.into())), "{value} {by}");
            }
        }
        assert_eq!(perform(&again(3, 7), 9, 0), Some((2, 7)));
        assert_eq!(perform(&again(3, -7), 9, 0), Some((16, -7)));
    }

    #[test]
    fn a_search_ends_at_the_number() {
        for number in [i16::MIN, -300, -1, 0, 1, 77, i16::MAX] {
            let mut search = Search {
                id: 1,
                number: 0,
                low: i16::MIN,
                high: i16::MAX,
            };
            let mut questions = 0;
            while !search.known() {
                let than = search.middle();
                search.learn(than, number > than);
                questions += 1;
            }
            assert_eq!(search.low, number);
            assert!(questions <= 16);
        }
    }

    #[test]
    fn no_question_can_be_done() {
        for value in [0u16, 9, 32767] {
            for than in [i16::MIN, -1, 0, 100, i16::MAX - 1] {
                let operations = question(0, value, than);
                assert_eq!(perform(&operations, value.into(), 0), None);
                assert!(operations.len() <= 8);
            }
        }
    }
}
