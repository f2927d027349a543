//! In which order the processes of a tree are created: pure, from the image alone.
//!
//! What fork decides for good must be right at the fork: the parent, the
//! session (unless the child starts its own), and the pages shared
//! copy-on-write. So a child that is to be in the session its parent had before
//! it started its own is forked before that; a child that shares pages with
//! its parent is forked after the parent's memory is in place, all others
//! before. A process whose session leader is not its parent (an orphan that
//! was reparented) is forked by a temporary child of that leader, which then
//! ends, so that the process comes to the nearest subreaper, its parent. A dead
//! session or group leader is stood in for by a temporary process with its PID.

use std::collections::{BTreeMap, HashMap, HashSet};

use freezeframe_error::{Error, Result};
use freezeframe_kinds::model::Process;

/// A process taking part in the restore: its PID, or a negative number for a
/// temporary one whose PID does not matter.
pub type Actor = i32;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The root is created.
    Root(Actor),
    /// `from` forks `child`.
    Fork {
        /// The one that forks.
        from: Actor,
        /// The one that comes to be.
        child: Actor,
    },
    /// Its threads are made, since one of them is to fork.
    Threads(Actor),
    /// setsid(2).
    Setsid(Actor),
    /// Becomes a child subreaper for the time being.
    Subreaper(Actor),
    /// Its memory is mapped and filled.
    Memory {
        /// Whose.
        who: Actor,
        /// Whose complete memory it was forked with, if it shares pages with it.
        like: Option<Actor>,
    },
    /// setpgid(0, group).
    JoinGroup {
        /// Who joins.
        who: Actor,
        /// The group.
        group: i32,
    },
    /// A temporary process ends and is reaped by the one that forked it.
    End {
        /// The temporary one.
        who: Actor,
        /// Its parent.
        parent: Actor,
    },
    /// A process becomes the zombie it was.
    Zombie(Actor),
}

struct Planner<'a> {
    procs: &'a [Process],
    by_pid: HashMap<i32, &'a Process>,
    children: BTreeMap<i32, Vec<&'a Process>>,
    /// Processes that share pages with their parent.
    cow: &'a HashSet<i32>,
    steps: Vec<Step>,
    memory_done: HashSet<i32>,
    /// Forked with the complete memory of their parent.
    born_full: HashSet<i32>,
    threads_made: HashSet<i32>,
    temps: i32,
}

/// The steps that recreate `procs` (parents before children). `cow` are those
/// whose page index refers to their parent's pages.
pub fn plan(procs: &[Process], cow: &HashSet<i32>) -> Result<Vec<Step>> {
    let root = procs
        .first()
        .ok_or_else(|| Error::corrupt("the image has no process"))?;
    let by_pid: HashMap<_, _> = procs.iter().map(|p| (p.pid(), p)).collect();
    if by_pid.len() != procs.len() {
        return Err(Error::corrupt("two processes have the same PID"));
    }
    let mut children: BTreeMap<i32, Vec<&Process>> = BTreeMap::new();
    let mut seen = HashSet::from([root.pid()]);
    for p in &procs[1..] {
        if !seen.contains(&p.ppid) || !by_pid[&p.ppid].is_alive() {
            return Err(Error::corrupt(format!(
                "process {} has no parent in the image",
                p.pid()
            )));
        }
        seen.insert(p.pid());
        children.entry(p.ppid).or_default().push(p);
    }
    if !root.is_alive() {
        return Err(Error::corrupt("the root of the tree is a zombie"));
    }
    let mut planner = Planner {
        procs,
        by_pid,
        children,
        cow,
        steps: vec![Step::Root(root.pid())],
        memory_done: HashSet::new(),
        born_full: HashSet::new(),
        threads_made: HashSet::new(),
        temps: 0,
    };
    // Outside the tree, the root's session is that of the restorer, whatever its number.
    let outside = if root.sid == root.pid() { 0 } else { root.sid };
    planner.process(root, outside)?;
    planner.groups()?;
    planner.steps.extend(
        procs
            .iter()
            .filter(|p| !p.is_alive())
            .map(|p| Step::Zombie(p.pid())),
    );
    Ok(planner.steps)
}

impl<'a> Planner<'a> {
    /// Steps for a process that exists and was born in session `birth`.
    fn process(&mut self, p: &'a Process, birth: i32) -> Result<()> {
        let children = self.children.remove(&p.pid()).unwrap_or_default();
        let leads = p.sid == p.pid();
        let (early, rest): (Vec<_>, Vec<_>) = children
            .into_iter()
            .partition(|c| leads && c.sid == birth && c.sid != c.pid());
        self.batch_of_children(p, early, birth)?;
        if leads {
            self.steps.push(Step::Setsid(p.pid()));
        }
        let (own, orphans): (Vec<_>, Vec<_>) = rest
            .into_iter()
            .partition(|c| c.sid == c.pid() || c.sid == p.sid);
        self.batch_of_children(p, own, p.sid)?;
        self.orphans(p, orphans)?;
        if p.is_alive() {
            self.memory(p.pid());
        }
        Ok(())
    }

    fn memory(&mut self, pid: i32) {
        if self.memory_done.insert(pid) {
            let like = self
                .born_full
                .contains(&pid)
                .then(|| self.by_pid[&pid].ppid);
            self.steps.push(Step::Memory { who: pid, like });
        }
    }

    /// Children forked by `p` itself while it is in session `sid`: those that
    /// share no pages first, then memory, then the others.
    fn batch_of_children(
        &mut self,
        p: &Process,
        children: Vec<&'a Process>,
        sid: i32,
    ) -> Result<()> {
        let (cow, plain): (Vec<_>, Vec<_>) = children
            .into_iter()
            .partition(|c| self.cow.contains(&c.pid()));
        for c in plain {
            self.fork(p, c);
            self.process(c, sid)?;
        }
        for c in cow {
            self.memory(p.pid());
            self.born_full.insert(c.pid());
            self.fork(p, c);
            self.process(c, sid)?;
        }
        Ok(())
    }

    /// A child is forked by the thread whose child it is.
    fn fork(&mut self, p: &Process, child: &Process) {
        let mut from = p.pid();
        if child.parent_tid != from && p.threads.contains(&child.parent_tid) {
            if self.threads_made.insert(from) {
                self.steps.push(Step::Threads(from));
            }
            from = child.parent_tid;
        }
        self.steps.push(Step::Fork {
            from,
            child: child.pid(),
        });
    }

    /// Children of `p` that came to it when their parent ended.
    fn orphans(&mut self, p: &Process, orphans: Vec<&'a Process>) -> Result<()> {
        let mut by_session: BTreeMap<i32, Vec<&Process>> = BTreeMap::new();
        for c in orphans {
            by_session.entry(c.sid).or_default().push(c);
        }
        for (sid, members) in by_session {
            self.steps.push(Step::Subreaper(p.pid()));
            // A leader that is to be a zombie is one only at the end.
            let leader = self.by_pid.get(&sid).filter(|l| l.sid == sid);
            let (temp, parent) = match leader {
                Some(leader) => {
                    self.temps -= 1;
                    self.steps.push(Step::Fork {
                        from: leader.pid(),
                        child: self.temps,
                    });
                    (self.temps, leader.pid())
                }
                None => {
                    // The leader is gone, so nobody else may have its number. What it
                    // is forked with, its children are born with.
                    if members.iter().any(|m| self.cow.contains(&m.pid())) {
                        self.memory(p.pid());
                        self.born_full.extend(
                            members
                                .iter()
                                .map(|m| m.pid())
                                .filter(|m| self.cow.contains(m)),
                        );
                    }
                    self.steps.push(Step::Fork {
                        from: p.pid(),
                        child: sid,
                    });
                    self.steps.push(Step::Setsid(sid));
                    (sid, p.pid())
                }
            };
            for c in &members {
                self.steps.push(Step::Fork {
                    from: temp,
                    child: c.pid(),
                });
            }
            self.steps.push(Step::End { who: temp, parent });
            for c in members {
                self.process(c, sid)?;
            }
        }
        Ok(())
    }

    fn groups(&mut self) -> Result<()> {
        let outside = |p: &Process| !self.by_pid.contains_key(&p.pgid);
        let mut joins = Vec::new();
        let mut dead: BTreeMap<i32, Vec<&Process>> = BTreeMap::new();
        let root = &self.procs[0];
        for p in self.procs {
            if p.sid == p.pid() {
                continue; // setsid made its group
            }
            if p.pgid == p.pid() {
                joins.insert(
                    0,
                    Step::JoinGroup {
                        who: p.pid(),
                        group: p.pgid,
                    },
                );
            } else if !outside(p) {
                joins.push(Step::JoinGroup {
                    who: p.pid(),
                    group: p.pgid,
                });
            } else if p.pgid == p.sid {
                // Born in that group, with the session whose leader is gone.
            } else if p.pgid != root.pgid || root.sid == root.pid() {
                dead.entry(p.pgid).or_default().push(p);
            }
        }
        self.steps.append(&mut joins);
        for (group, members) in dead {
            // setpgid(2) needs a process with that PID in the session, just long enough.
            let by = members[0].pid();
            self.steps.push(Step::Fork {
                from: by,
                child: group,
            });
            self.steps.push(Step::JoinGroup { who: group, group });
            for m in members {
                self.steps.push(Step::JoinGroup {
                    who: m.pid(),
                    group,
                });
            }
            self.steps.push(Step::End {
                who: group,
                parent: by,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freezeframe_kinds::model::Life;

    fn p(pid: i32, ppid: i32, pgid: i32, sid: i32) -> Process {
        Process {
            pids: vec![pid],
            ppid,
            parent_tid: ppid,
            pgid,
            sid,
            life: Life::Alive,
            exit_signal: 17,
            comm: String::new(),
            threads: vec![pid],
            mm: pid as u64,
            cow_parent: None,
        }
    }

    fn full(who: i32) -> Step {
        Step::Memory { who, like: None }
    }

    fn at(steps: &[Step], step: Step) -> usize {
        steps
            .iter()
            .position(|s| *s == step)
            .unwrap_or_else(|| panic!("{step:?} not in {steps:?}"))
    }

    #[test]
    fn a_child_without_shared_pages_is_forked_before_the_memory() {
        let steps = plan(&[p(10, 1, 10, 10), p(11, 10, 10, 10)], &HashSet::new()).unwrap();
        assert!(
            at(
                &steps,
                Step::Fork {
                    from: 10,
                    child: 11
                }
            ) < at(&steps, full(10))
        );
        assert!(
            at(&steps, Step::Setsid(10))
                < at(
                    &steps,
                    Step::Fork {
                        from: 10,
                        child: 11
                    }
                )
        );
    }

    #[test]
    fn a_child_that_shares_pages_is_forked_after_the_memory() {
        let steps = plan(&[p(10, 1, 10, 10), p(11, 10, 10, 10)], &HashSet::from([11])).unwrap();
        assert!(
            at(&steps, full(10))
                < at(
                    &steps,
                    Step::Fork {
                        from: 10,
                        child: 11
                    }
                )
        );
        assert!(steps.contains(&Step::Memory {
            who: 11,
            like: Some(10)
        }));
        assert_eq!(steps.iter().filter(|s| **s == full(10)).count(), 1);
    }

    #[test]
    fn a_child_left_in_the_former_session_is_forked_before_setsid() {
        let procs = [p(10, 1, 10, 10), p(11, 10, 11, 11), p(12, 11, 10, 10)];
        let steps = plan(&procs, &HashSet::new()).unwrap();
        assert!(
            at(
                &steps,
                Step::Fork {
                    from: 11,
                    child: 12
                }
            ) < at(&steps, Step::Setsid(11))
        );
    }

    #[test]
    fn an_orphan_of_a_dead_session_leader_gets_one_for_its_birth() {
        let procs = [p(10, 1, 10, 10), p(13, 10, 12, 12)];
        let steps = plan(&procs, &HashSet::new()).unwrap();
        assert!(
            at(&steps, Step::Subreaper(10))
                < at(
                    &steps,
                    Step::End {
                        who: 12,
                        parent: 10
                    }
                )
        );
        assert!(
            at(&steps, Step::Setsid(12))
                < at(
                    &steps,
                    Step::Fork {
                        from: 12,
                        child: 13
                    }
                )
        );
    }

    #[test]
    fn an_orphan_of_a_living_session_leader_is_forked_by_its_temporary_child() {
        let procs = [p(10, 1, 10, 10), p(11, 10, 11, 11), p(12, 10, 11, 11)];
        let steps = plan(&procs, &HashSet::new()).unwrap();
        assert!(
            at(
                &steps,
                Step::Fork {
                    from: 11,
                    child: -1
                }
            ) < at(
                &steps,
                Step::Fork {
                    from: -1,
                    child: 12
                }
            )
        );
    }

    #[test]
    fn a_thread_forks_its_own_children() {
        let mut procs = [p(10, 1, 10, 10), p(12, 10, 10, 10)];
        procs[0].threads.push(11);
        procs[1].parent_tid = 11;
        let steps = plan(&procs, &HashSet::new()).unwrap();
        assert!(
            at(&steps, Step::Threads(10))
                < at(
                    &steps,
                    Step::Fork {
                        from: 11,
                        child: 12
                    }
                )
        );
    }

    #[test]
    fn an_image_without_a_parent_is_refused() {
        assert!(plan(&[p(10, 1, 10, 10), p(12, 99, 10, 10)], &HashSet::new()).is_err());
        assert!(plan(&[], &HashSet::new()).is_err());
        assert!(plan(&[p(10, 1, 10, 10), p(10, 10, 10, 10)], &HashSet::new()).is_err());
    }
}
