//! Devices that no kind carries: the hook for those who can carry them.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use freezeframe_error::{Error, Result};
use freezeframe_image::Tag;
use serde::{Deserialize, Serialize};

/// Carries devices that freezeframe itself does not: only who knows a driver can tell
/// what is behind its descriptors and mappings.
///
/// A plugin is given to a dump and to the restore of its image. All its methods are
/// called on the operation's thread, in this order; those it leaves out do nothing.
///
/// | At a dump | |
/// |---|---|
/// | [`before_freeze`](Plugin::before_freeze) | All processes run. What needs their help is done here. |
/// | [`after_freeze`](Plugin::after_freeze) | The whole tree is stopped, nothing is read yet. |
/// | [`dump_file`](Plugin::dump_file), [`dump_mapping`](Plugin::dump_mapping) | For each open file and VMA that no kind carries. The tree is stopped. |
/// | [`after_thaw`](Plugin::after_thaw) | The tree runs on (`leave_running`), or is left stopped. Not called if it was ended. |
/// | [`dump_failed`](Plugin::dump_failed) | Instead of it, if the dump failed: the tree runs as before. |
///
/// | At a restore | |
/// |---|---|
/// | [`restore_mapping`](Plugin::restore_mapping), then [`restore_file`](Plugin::restore_file) | Nothing of the program runs yet. |
/// | [`after_restore`](Plugin::after_restore) | All processes run. |
/// | [`restore_failed`](Plugin::restore_failed) | Instead of it: nothing of the tree is left. |
///
/// While the tree is stopped a method must not wait for one of its processes, and
/// should be quick: the program waits, too.
///
/// # Failures
/// An error of `before_freeze`, `after_freeze`, `after_thaw`, `dump_failed` or
/// `after_restore`, or that the plugin of an image is not there at its restore, is a
/// warning, unless plugins were required (`require_plugins`): then the operation fails
/// with it. An error of a method that dumps or restores a file or mapping always ends the
/// operation, as what is not carried does.
///
/// If freezeframe is killed by SIGKILL between `before_freeze` and `after_thaw`, nobody
/// calls the latter.
pub trait Plugin: fmt::Debug + Send + Sync {
    /// Its name, by which an image asks for it again.
    fn name(&self) -> &str;

    /// Before anything is stopped.
    fn before_freeze(&self, _tree: &PluginTree<'_>) -> Result<()> {
        Ok(())
    }

    /// When the whole tree is stopped. With a state for the image,
    /// [`after_restore`](Plugin::after_restore) is called with it.
    fn after_freeze(&self, _tree: &PluginTree<'_>) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// The state of an open file that no kind carries, if it is one of this plugin's.
    fn dump_file(&self, _file: &DeviceFile<'_>) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// The state behind a VMA that no kind carries, if it is one of this plugin's. Its
    /// bytes are the plugin's to carry.
    fn dump_mapping(&self, _mapping: &DeviceMapping<'_>) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// The dump is done, and the tree is still there.
    fn after_thaw(&self, _tree: &PluginTree<'_>) -> Result<()> {
        Ok(())
    }

    /// The dump has failed after `before_freeze` was called, whether that failed or not:
    /// what it has done is undone. The same as `after_thaw` unless said otherwise.
    fn dump_failed(&self, tree: &PluginTree<'_>) -> Result<()> {
        self.after_thaw(tree)
    }

    /// A descriptor whose mapping gives what was behind the VMA with this state. Mapped
    /// where it was, at the same offset; it must allow that.
    fn restore_mapping(&self, _state: &[u8]) -> Result<OwnedFd> {
        Err(Error::unsupported("the plugin restores no mappings"))
    }

    /// A descriptor for the open file with this state; the process is given it, and
    /// status flags, owner and signal are set as they were.
    fn restore_file(&self, _state: &[u8]) -> Result<OwnedFd> {
        Err(Error::unsupported("the plugin restores no files"))
    }

    /// The restored tree runs; `state` is that of [`after_freeze`](Plugin::after_freeze).
    fn after_restore(&self, _tree: &PluginTree<'_>, _state: &[u8]) -> Result<()> {
        Ok(())
    }

    /// The restore has failed: what was made for it beyond descriptors goes.
    fn restore_failed(&self) {}
}

/// The tree that a plugin is called for.
#[derive(Clone, Copy)]
pub struct PluginTree<'a> {
    /// PIDs of its processes, parents first: before the freeze those there are just now,
    /// after it all.
    pub pids: &'a [i32],
    /// How long the operation waits for any single thing.
    pub timeout: Duration,
    /// Whether the caller wants the operation to stop. To be asked where something lasts.
    pub cancelled: &'a dyn Fn() -> bool,
}

impl fmt::Debug for PluginTree<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PluginTree")
            .field("pids", &self.pids)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// An open file that no kind carries.
#[derive(Clone, Copy, Debug)]
pub struct DeviceFile<'a> {
    /// A process that has it open.
    pub pid: i32,
    /// Its number there.
    pub fd: i32,
    /// What /proc/PID/fd/N leads to: a path, `anon_inode:[NAME]`.
    pub name: &'a [u8],
    /// Type and permissions (`st_mode`).
    pub mode: u32,
    /// Which device, of one (`st_rdev`).
    pub rdev: u64,
    /// Access mode and status flags.
    pub flags: u32,
    /// The same open file, for us: what is changed through it is changed for the program.
    pub file: BorrowedFd<'a>,
}

/// A VMA of which no kind carries what it maps.
#[derive(Clone, Copy, Debug)]
pub struct DeviceMapping<'a> {
    /// Its process.
    pub pid: i32,
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Offset into what is mapped, in bytes.
    pub offset: u64,
    /// Whether it is MAP_SHARED.
    pub shared: bool,
    /// What /proc/PID/maps shows.
    pub name: &'a [u8],
}

/// The plugins of an operation, in the order they are asked.
pub type Plugins = Vec<Arc<dyn Plugin>>;

/// Tag of the state that a plugin has for the whole tree, an optional record.
pub const TREE_STATE: Tag = Tag::new(*b"PLUG");

/// What a plugin has said of something.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// Its name.
    pub plugin: String,
    /// What it needs to restore it.
    pub state: Vec<u8>,
}

impl State {
    /// The first answer to `ask`.
    pub(crate) fn first(
        plugins: &Plugins,
        ask: impl Fn(&dyn Plugin) -> Result<Option<Vec<u8>>>,
    ) -> Result<Option<State>> {
        for plugin in plugins {
            let answer = ask(&**plugin).map_err(|e| e.context(said_by(plugin.name())))?;
            if let Some(state) = answer {
                return Ok(Some(State {
                    plugin: plugin.name().to_owned(),
                    state,
                }));
            }
        }
        Ok(None)
    }

    /// The plugin that restores it.
    ///
    /// # Errors
    /// It is not there.
    pub fn plugin<'p>(&self, plugins: &'p Plugins) -> Result<&'p dyn Plugin> {
        let found = plugins.iter().find(|p| p.name() == self.plugin);
        found.map(|p| &**p).ok_or_else(|| {
            let name = &self.plugin;
            Error::unsupported(format!(
                "the image needs the plugin {name}, which is not there"
            ))
        })
    }
}

/// How an error of a plugin begins.
pub fn said_by(name: &str) -> String {
    format!("plugin {name}")
}
