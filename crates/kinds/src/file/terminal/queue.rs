//! What is queued in a pseudo-terminal, taken out and put back.
//!
//! A terminal has no peeking: what waits in it can only be read. So it is read
//! and put back at once, the target being stopped. While that is done, the
//! settings are such that nothing is interpreted, echoed or changed on its way.
//!
//! Of either side the line discipline holds up to 4,095 bytes; what does not
//! fit waits in front of it, as it was written. The first are put back by TIOCSTI,
//! which gives them to the line discipline directly, the others are written again.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Result, SysExt};
use freezeframe_sys::fd::terminal::{self, Settings, VEOF, VEOL, VEOL2, VSTART, VSTOP};
use freezeframe_sys::fd::{self, ioctl};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};

use crate::bytes::Bytes;

/// What a line discipline holds.
pub(super) const HOLDS: usize = 4095;
/// More than a line can have.
const LINE: usize = 8192;
/// How long the kernel may take to move what was written on its way.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a line ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum End {
    /// It is still being typed (or the terminal knows no lines).
    Open,
    /// By a newline, its last byte.
    Newline,
    /// By another end-of-line character, its last byte.
    Char,
    /// By the end-of-file character, which is not part of it.
    Eof,
}

/// A line that waits to be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Line {
    /// Its bytes, those that end it included.
    pub text: Bytes,
    /// How it ended.
    pub end: End,
}

/// What waits to be read from a slave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Input {
    /// What the line discipline holds.
    pub lines: Vec<Line>,
    /// What it has not taken yet.
    pub rest: Bytes,
}

/// Why and how output is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stopped {
    /// It is not.
    No,
    /// By the stop character (^S).
    Char,
    /// By tcflow(3).
    Call,
}

/// A pseudo-terminal whose settings are changed for a while: they come back when this goes.
pub(super) struct Meddling<'a> {
    /// Its master.
    pub master: BorrowedFd<'a>,
    /// A descriptor of ours for its slave, not blocking.
    pub slave: Option<BorrowedFd<'a>>,
    /// The settings it has.
    settings: Settings,
    packet: bool,
}

impl<'a> Meddling<'a> {
    /// Turns packet mode off, which would tell of every change.
    pub(super) fn new(
        master: BorrowedFd<'a>,
        slave: Option<BorrowedFd<'a>>,
        settings: Settings,
        packet: bool,
    ) -> Result<Meddling<'a>> {
        if packet {
            terminal::set_packet_mode(master, false)?;
        }
        Ok(Meddling {
            master,
            slave,
            settings,
            packet,
        })
    }

    fn set(&self, settings: &Settings) -> Result<()> {
        terminal::set_settings(self.master, settings)
    }

    /// The settings in which nothing is interpreted, lines or not.
    fn neutral(&self, lines: bool) -> Settings {
        let (icanon, extproc) = (libc::ICANON, libc::EXTPROC);
        let kept = if lines { icanon | extproc } else { extproc };
        Settings {
            // IXON stays: taken away, it would start what was stopped.
            input: self.settings.input & libc::IXON,
            output: 0,
            local: self.settings.local & kept,
            chars: [0; 19],
            ..self.settings
        }
    }

    /// Whether the slave is read line by line.
    fn lines(&self) -> bool {
        has_lines(&self.settings)
    }

    /// What waits to be read from the slave, taken out: in `lines`, whatever happens.
    pub(super) fn take_input(&self, lines: &mut Vec<Line>) -> Result<()> {
        let Some(slave) = self.slave else {
            return Ok(());
        };
        if !self.lines() {
            if waiting(slave)? == 0 {
                return Ok(());
            }
        } else if ready(slave, PollFlags::POLLIN)? {
            self.set(&self.neutral(true))?;
            while let Some(text) = read_line(slave)? {
                let end = self.end_of(&text);
                lines.push(Line {
                    text: text.into(),
                    end,
                });
            }
        }
        // A line that is still being typed shows only where there are no lines.
        self.set(&self.neutral(false))?;
        let mut text = Vec::new();
        let drained = drain(slave, &mut text);
        if !text.is_empty() {
            lines.push(Line {
                text: text.into(),
                end: End::Open,
            });
        }
        if lines.is_empty() {
            self.set(&self.settings)?;
        }
        drained
    }

    fn end_of(&self, text: &[u8]) -> End {
        let chars = &self.settings.chars;
        let iexten = self.settings.local & libc::IEXTEN != 0;
        match text.last() {
            Some(b'\n') => End::Newline,
            Some(c) if *c != 0 && (*c == chars[VEOL] || iexten && *c == chars[VEOL2]) => End::Char,
            _ => End::Eof,
        }
    }

    /// Puts it back, and gives the terminal its settings.
    pub(super) fn put_input(&self, input: &Input) -> Result<()> {
        if let Some(slave) = self.slave.filter(|_| !input.lines.is_empty()) {
            let lines = self.lines();
            // First without, then with lines: what ended them before is forgotten.
            self.set(&self.neutral(lines))?;
            for line in &input.lines {
                let (text, last) = match line.end {
                    End::Char => line.text.split_at(line.text.len().saturating_sub(1)),
                    End::Eof => (&line.text[..], &b"\x04"[..]),
                    End::Open | End::Newline => (&line.text[..], &b""[..]),
                };
                type_all(slave, text)?;
                if let Some(c) = last.first().filter(|_| lines) {
                    let mut ending = self.neutral(true);
                    let place = if line.end == End::Eof { VEOF } else { VEOL };
                    ending.chars[place] = *c;
                    self.set(&ending)?;
                    type_all(slave, last)?;
                    self.set(&self.neutral(true))?;
                }
            }
        }
        self.set(&self.settings)?;
        // This has not been interpreted yet, and is not before there is room for it.
        match self.slave.filter(|_| !input.rest.is_empty()) {
            Some(slave) => write_to_master(self.master, &input.rest, slave),
            None => Ok(()),
        }
    }

    /// What waits to be read from the master, taken out: in `output`, whatever happens.
    pub(super) fn take_output(&self, output: &mut Vec<u8>) -> Result<()> {
        drain(self.master, output)
    }

    /// Puts it back. Output must not be stopped if it is more than a line discipline holds.
    pub(super) fn put_output(&self, output: &[u8]) -> Result<()> {
        let (held, rest) = output.split_at(output.len().min(HOLDS));
        type_all(self.master, held)?;
        if rest.is_empty() {
            return Ok(());
        }
        let slave = self
            .slave
            .ok_or_else(|| Error::corrupt("output of a slave that was never opened"))?;
        self.set(&self.neutral(true))?;
        let written = write_all(slave, rest, self.master);
        self.set(&self.settings)?;
        written
    }

    /// Whether output is stopped, the output queue having been emptied, and how.
    pub(super) fn stopped(&self) -> Result<Stopped> {
        let Some(slave) = self.slave else {
            return Ok(Stopped::No);
        };
        if ready(slave, PollFlags::POLLOUT)? {
            return Ok(Stopped::No);
        }
        // The start character starts only what the stop character stopped.
        if self.settings.input & libc::IXON == 0 {
            return Ok(Stopped::Call);
        }
        self.flow_char(slave, VSTART)?;
        match ready(slave, PollFlags::POLLOUT) {
            Ok(false) => Ok(Stopped::Call),
            started => {
                self.flow_char(slave, VSTOP)?;
                started.map(|_| Stopped::Char)
            }
        }
    }

    /// Stops output in this way.
    pub(super) fn stop(&self, how: Stopped) -> Result<()> {
        match (how, self.slave) {
            (Stopped::Char, Some(slave)) => self.flow_char(slave, VSTOP),
            (Stopped::Call, Some(slave)) => terminal::set_stopped(slave, true),
            _ => Ok(()),
        }
    }

    /// Starts it again.
    pub(super) fn start(&self, how: Stopped) -> Result<()> {
        match (how, self.slave) {
            (Stopped::Char, Some(slave)) => self.flow_char(slave, VSTART),
            (Stopped::Call, Some(slave)) => terminal::set_stopped(slave, false),
            _ => Ok(()),
        }
    }

    /// Types the start or the stop character, whatever they are here.
    fn flow_char(&self, slave: BorrowedFd<'_>, which: usize) -> Result<()> {
        let mut settings = self.neutral(true);
        settings.input |= libc::IXON;
        settings.chars[VSTART] = 0x11;
        settings.chars[VSTOP] = 0x13;
        self.set(&settings)?;
        let typed = terminal::type_byte(slave, settings.chars[which]);
        // Without IXON what is stopped by a character would start.
        self.set(&self.settings)?;
        typed
    }
}

impl Drop for Meddling<'_> {
    fn drop(&mut self) {
        // As it was already, unless something failed in between.
        if terminal::settings(self.master).is_ok_and(|now| now != self.settings) {
            let _ = self.set(&self.settings);
        }
        if self.packet {
            let _ = terminal::set_packet_mode(self.master, true);
        }
    }
}

/// Whether a slave with these settings is read line by line.
pub(super) fn has_lines(settings: &Settings) -> bool {
    settings.local & (libc::ICANON | libc::EXTPROC) == libc::ICANON
}

/// Tells what the line discipline held from what it had not taken yet.
pub(super) fn cut(lines: Vec<Line>) -> Input {
    let mut input = Input::default();
    let mut rest = Vec::new();
    let mut held = 0;
    for mut line in lines {
        let marks = usize::from(line.end == End::Eof);
        let room = HOLDS.saturating_sub(held);
        held += line.text.len() + marks;
        if room >= line.text.len() + marks {
            input.lines.push(line);
            continue;
        }
        rest.extend_from_slice(&line.text[room.min(line.text.len())..]);
        line.text.0.truncate(room);
        line.end = End::Open;
        if !line.text.is_empty() {
            input.lines.push(line);
        }
    }
    input.rest = rest.into();
    input
}

/// Whether any of these events is there; what is on its way is waited for.
pub(super) fn ready(fd: BorrowedFd<'_>, events: PollFlags) -> Result<bool> {
    let mut set = [PollFd::new(fd, events)];
    nix::poll::poll(&mut set, PollTimeout::ZERO).sys("poll")?;
    Ok(set[0].revents().is_some_and(|r| r.intersects(events)))
}

/// How many bytes can be read; what is on its way is waited for.
pub(super) fn waiting(fd: BorrowedFd<'_>) -> Result<usize> {
    // poll(2) waits for the kernel to hand on what was written, if nothing is there.
    ready(fd, PollFlags::POLLIN)?;
    ioctl::readable_bytes(fd)
}

/// Reads what there is into `all`, where there are no lines. Never blocks.
fn drain(fd: BorrowedFd<'_>, all: &mut Vec<u8>) -> Result<()> {
    loop {
        let mut some = vec![0; waiting(fd)?];
        if some.is_empty() {
            return Ok(());
        }
        let n = nix::unistd::read(fd, &mut some).sys("read(terminal)")?;
        all.extend_from_slice(&some[..n]);
    }
}

/// One line, or none if there is none; an end of file is an empty one.
fn read_line(slave: BorrowedFd<'_>) -> Result<Option<Vec<u8>>> {
    ready(slave, PollFlags::POLLIN)?;
    let mut text = vec![0; LINE];
    match nix::unistd::read(slave, &mut text) {
        Ok(n) => {
            text.truncate(n);
            Ok(Some(text))
        }
        Err(Errno::EAGAIN) => Ok(None),
        Err(e) => Err(e).sys("read(terminal)"),
    }
}

fn type_all(fd: BorrowedFd<'_>, text: &[u8]) -> Result<()> {
    text.iter().try_for_each(|c| terminal::type_byte(fd, *c))
}

/// Writes what is to wait in front of a full line discipline; `other` is the side that takes it.
///
/// It has been there before, but how much fits depends on how it is written:
/// the kernel allows 8,192 bytes of buffers, each of a multiple of 256 for twice
/// as many bytes, and a last one of any size beyond.
fn write_all(fd: BorrowedFd<'_>, text: &[u8], other: BorrowedFd<'_>) -> Result<()> {
    const PIECE: usize = 256;
    const IN_PIECES: usize = 2 * 8192;
    let start = Instant::now();
    let mut written = 0;
    while written < text.len() {
        let piece = match text.len() - written {
            left if written < IN_PIECES => left.min(PIECE),
            left => left,
        };
        match nix::unistd::write(fd, &text[written..written + piece]) {
            Ok(n) => written += n,
            Err(Errno::EAGAIN) if start.elapsed() < PATIENCE => {
                ready(other, PollFlags::POLLIN)?;
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) => return Err(e).sys("write(terminal)"),
        }
    }
    Ok(())
}

/// Writes to a master, which may be one that blocks.
fn write_to_master(master: BorrowedFd<'_>, text: &[u8], slave: BorrowedFd<'_>) -> Result<()> {
    let flags = fd::status_flags(master)?;
    let blocks = !flags.contains(OFlag::O_NONBLOCK);
    if blocks {
        fd::set_status_flags(master, flags | OFlag::O_NONBLOCK)?;
    }
    let written = write_all(master, text, slave);
    if blocks {
        fd::set_status_flags(master, flags)?;
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(len: usize, end: End) -> Line {
        Line {
            text: vec![b'x'; len].into(),
            end,
        }
    }

    #[test]
    fn what_fits_is_held() {
        let lines = vec![line(4000, End::Newline), line(94, End::Eof)];
        let input = cut(lines.clone());
        assert_eq!(input.lines, lines);
        assert!(input.rest.is_empty());
    }

    #[test]
    fn what_does_not_fit_waits() {
        let input = cut(vec![
            line(4000, End::Newline),
            line(200, End::Newline),
            line(7, End::Open),
        ]);
        assert_eq!(input.lines, [line(4000, End::Newline), line(95, End::Open)]);
        assert_eq!(input.rest.len(), 105 + 7);
    }
}
