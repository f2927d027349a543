//! Calling the plugins around a freeze, and after a restore.

use std::cell::{Cell, RefCell};
use std::error::Error as _;
use std::time::Duration;

use freezeframe_error::{Error, Result};
use freezeframe_image::{Image, RawRecord, decode, encode};
use freezeframe_kinds::plugin::{Plugin, PluginTree, Plugins, State, TREE_STATE, said_by};
use freezeframe_kinds::{DumpOptions, ProcView, RestoreOptions};
use freezeframe_sys::ids::Pid;

use crate::events::Events;
use crate::{log, tree};

/// Version of the record of a plugin's state.
const VERSION: u16 = 1;

/// The plugins of a dump, called in their order. Dropped before the dump is done, it
/// tells them that it has failed.
pub(crate) struct Around<'a> {
    calls: Calls<'a>,
    /// The processes there were, parents first.
    pids: RefCell<Vec<i32>>,
    done: Cell<bool>,
}

/// How plugins are called, and what came of it.
struct Calls<'a> {
    plugins: &'a Plugins,
    required: bool,
    timeout: Duration,
    events: &'a dyn Events,
    warnings: RefCell<Vec<String>>,
}

impl<'a> Calls<'a> {
    fn new(
        (plugins, required): (&'a Plugins, bool),
        timeout: Duration,
        events: &'a dyn Events,
    ) -> Calls<'a> {
        Calls {
            plugins,
            required,
            timeout,
            events,
            warnings: RefCell::default(),
        }
    }

    /// Calls one with the tree; what fails is a warning, or the error if plugins are required.
    fn call<T>(
        &self,
        plugin: &dyn Plugin,
        pids: &[i32],
        call: impl FnOnce(&PluginTree<'_>) -> Result<T>,
    ) -> Result<Option<T>> {
        let tree = PluginTree {
            pids,
            timeout: self.timeout,
            cancelled: &|| self.events.cancelled(),
        };
        match call(&tree).map_err(|e| e.context(said_by(plugin.name()))) {
            Ok(done) => Ok(Some(done)),
            Err(_) if self.events.cancelled() => Err(crate::freeze::cancelled()),
            Err(e) if self.required => Err(e),
            Err(e) => {
                self.warn(in_full(&e));
                Ok(None)
            }
        }
    }

    fn warn(&self, text: String) {
        log!(self.events, Warning, "{text}");
        self.warnings.borrow_mut().push(text);
    }
}

impl<'a> Around<'a> {
    /// Tells the plugins of a dump that the tree under `root` will be stopped.
    pub(crate) fn begin(
        root: i32,
        options: &'a DumpOptions,
        timeout: Duration,
        events: &'a dyn Events,
    ) -> Result<Around<'a>> {
        let plugins = (&options.plugins, options.require_plugins);
        let calls = Calls::new(plugins, timeout, events);
        let pids = match calls.plugins.is_empty() {
            true => Vec::new(),
            false => tree::pids_of(Pid(root)),
        };
        let around = Around {
            calls,
            pids: RefCell::new(pids),
            done: Cell::new(false),
        };
        around.each(|plugin, tree| plugin.before_freeze(tree))?;
        Ok(around)
    }

    fn each(&self, call: impl Fn(&dyn Plugin, &PluginTree<'_>) -> Result<()>) -> Result<()> {
        let pids = self.pids.borrow();
        let call = |plugin: &dyn Plugin| self.calls.call(plugin, &pids, |tree| call(plugin, tree));
        self.calls
            .plugins
            .iter()
            .try_for_each(|p| call(&**p).map(drop))
    }

    /// The tree is stopped: what the plugins have for the image.
    pub(crate) fn stopped(&self, procs: &[ProcView]) -> Result<Vec<RawRecord>> {
        *self.pids.borrow_mut() = procs.iter().map(|p| p.pid.0).collect();
        let pids = self.pids.borrow();
        let mut records = Vec::new();
        for (plugin, subject) in self.calls.plugins.iter().zip(0..) {
            let said = self
                .calls
                .call(&**plugin, &pids, |tree| plugin.after_freeze(tree))?;
            if let Some(state) = said.flatten() {
                let state = State {
                    plugin: plugin.name().to_owned(),
                    state,
                };
                records.push(RawRecord {
                    tag: TREE_STATE,
                    version: VERSION,
                    flags: 0,
                    subject,
                    body: encode(&state)?,
                });
            }
        }
        Ok(records)
    }

    /// The tree runs on, or has been let go stopped. Nothing if that was said already.
    pub(crate) fn thawed(&self) -> Result<()> {
        match self.done.replace(true) {
            true => Ok(()),
            false => self.each(|plugin, tree| plugin.after_thaw(tree)),
        }
    }

    /// The tree has been ended: nobody is told of anything any more.
    pub(crate) fn ended(&self) {
        self.done.set(true);
    }

    /// What failed so far.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.calls.warnings.take()
    }
}

impl Drop for Around<'_> {
    fn drop(&mut self) {
        if self.done.get() {
            return;
        }
        let pids = self.pids.borrow();
        for plugin in self.calls.plugins {
            let tree = PluginTree {
                pids: &pids,
                timeout: self.calls.timeout,
                // It is done whoever wants to stop.
                cancelled: &|| false,
            };
            if let Err(e) = plugin.dump_failed(&tree) {
                self.calls.warn(in_full(&e.context(said_by(plugin.name()))));
            }
        }
    }
}

/// An error with its causes.
fn in_full(e: &Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}

/// The states that plugins have put into an image.
fn states(image: &Image) -> Result<Vec<State>> {
    let records = image.records().iter().filter(|r| r.tag == TREE_STATE);
    records.map(|r| decode(&r.body)).collect()
}

/// Refuses an image that needs plugins which are not there, if they are required.
pub(crate) fn check(image: &Image, options: &RestoreOptions) -> Result<()> {
    if !options.require_plugins {
        return Ok(());
    }
    let states = states(image)?;
    let mut missing = states.iter().map(|state| state.plugin(&options.plugins));
    missing.try_for_each(|found| found.map(drop))
}

/// Calls the plugins of an image whose tree runs; gives the warnings.
///
/// # Errors
/// The first failure, where plugins are required.
pub(crate) fn after_restore(
    image: &Image,
    pids: &[i32],
    options: &RestoreOptions,
    timeout: Duration,
    events: &dyn Events,
) -> Result<Vec<String>> {
    let plugins = (&options.plugins, options.require_plugins);
    let calls = Calls::new(plugins, timeout, events);
    for state in states(image)? {
        match state.plugin(calls.plugins) {
            Ok(plugin) => {
                let call = |tree: &PluginTree<'_>| plugin.after_restore(tree, &state.state);
                calls.call(plugin, pids, call)?;
            }
            Err(e) => calls.warn(e.to_string()),
        }
    }
    Ok(calls.warnings.take())
}

/// Tells the plugins that a restore has failed, unless it is let go.
pub(crate) struct Failing<'a>(Option<&'a Plugins>);

impl<'a> Failing<'a> {
    /// Of these plugins.
    pub(crate) fn new(plugins: &'a Plugins) -> Failing<'a> {
        Failing(Some(plugins))
    }
    /// It has not failed.
    pub(crate) fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Failing<'_> {
    fn drop(&mut self) {
        for plugin in self.0.into_iter().flatten() {
            plugin.restore_failed();
        }
    }
}
