//! The same as a picture: what the image is made of, and each address space.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use freezeframe::{Error, Result};
use freezeframe_kinds::model::{Contents, OBJECT_INDEX, Process, Vma};
use freezeframe_pages::PageStats;
use svg::node::element::{Group, Rectangle, Style, Text, Title};
use svg::{Document, Node};

use super::Shown;
use super::composition::{self, Class, Part};
use crate::table::shown as clean;
use crate::words::{bytes, count};

/// More processes than this are drawn only if all are asked for.
const SOME_PROCESSES: usize = 40;

const WIDTH: f64 = 1000.0;
const MARGIN: f64 = 20.0;
/// What bars and address spaces have.
const ROOM: f64 = WIDTH - 2.0 * MARGIN;
/// Where bars begin and end: names are before them, numbers behind.
const BARS: (f64, f64) = (MARGIN + 110.0, WIDTH - MARGIN - 240.0);

/// What became of pages: its class in the drawing and its words, in the order of the legend.
const FATES: [(&str, &str); 4] = [
    ("stored", "stored"),
    ("same", "shared with a relative"),
    ("equal", "equal to others"),
    ("zero", "zeros"),
];

/// No more than these, so that everything else is a constant: attributes of
/// elements hold numbers and names of ours alone, never words of the image.
const STYLE: &str = "
text { font: 12px sans-serif; fill: #222; }
text.head { font-size: 15px; font-weight: bold; }
text.note { fill: #666; }
.stored { fill: #2f6db3; } .same { fill: #6aa84f; } .equal { fill: #d9a520; } .zero { fill: #d0d0d0; }
.image { fill: #1b3f69; }
.heap { fill: #e07b39; } .stack { fill: #b0413e; } .anonymous { fill: #e8b04a; }
.file { fill: #8e7cc3; } .object { fill: #45a29e; } .elsewhere { fill: #e6e6e6; }
.none { fill: #f7f7f7; }
";

/// Draws it into a file, over what that held; `-` is stdout.
///
/// # Errors
/// What the filesystem says.
pub(super) fn write(shown: &Shown, path: &Path, all: bool) -> Result<()> {
    let text = format!("{}\n", document(shown, all));
    if path.as_os_str() == "-" {
        crate::outcome::write(&text);
        return Ok(());
    }
    File::create(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|e| Error::io("write", e).on(path.display()))
}

fn document(shown: &Shown, all: bool) -> Document {
    let mut page = Page {
        group: Group::new(),
        at: MARGIN,
    };
    let header = shown.loaded.image.header();
    page.line("head", &format!("Image {}", header.image_id));
    page.composition(&composition::parts(shown));
    page.line("head", "Address spaces");
    page.line(
        "note",
        "From low to high addresses without the gaps, widths in proportion as far as each is visible.",
    );
    page.line(
        "note",
        "Above what a VMA is, below what became of its pages; point at one for more.",
    );
    let classes = Class::ALL.map(|c| (c.short(), c.name()));
    page.legend(&[&classes[..], &[("elsewhere", "nothing of it is stored")]].concat());
    let alive = || shown.loaded.procs.iter().filter(|p| p.is_alive());
    let most = if all { usize::MAX } else { SOME_PROCESSES };
    alive().take(most).for_each(|p| page.process(shown, p));
    if let Some(more @ 1..) = alive().count().checked_sub(most) {
        let more = count(more as u64, "more process");
        page.line("note", &format!("and {more} (--all draws them)"));
    }
    let height = page.at + MARGIN;
    Document::new()
        .set("viewBox", (0.0, 0.0, WIDTH, height))
        .set("width", WIDTH)
        .set("height", height)
        .add(Style::new(STYLE))
        .add(rectangle("page", (0.0, 0.0), (WIDTH, height)).set("fill", "white"))
        .add(page.group)
}

/// What is drawn so far, and how far down it reaches.
struct Page {
    group: Group,
    at: f64,
}

impl Page {
    fn add(&mut self, element: impl Into<Box<dyn Node>>) {
        self.group.append(element);
    }

    fn line(&mut self, class: &'static str, words: &str) {
        self.at += if class == "head" { 24.0 } else { 16.0 };
        self.add(text(class, (MARGIN, self.at), words));
        self.at += 6.0;
    }

    fn legend(&mut self, entries: &[(&'static str, &str)]) {
        let mut x = MARGIN;
        self.at += 8.0;
        for (class, words) in entries {
            self.add(rectangle(class, (x, self.at), (12.0, 12.0)));
            self.add(text("", (x + 17.0, self.at + 10.0), words));
            x += 34.0 + 7.0 * words.chars().count() as f64;
        }
        self.at += 20.0;
    }

    /// A bar for what became of all memory of each class, and one below it for what that takes
    /// in the image.
    fn composition(&mut self, parts: &[Part]) {
        self.line("head", "What it is made of");
        self.legend(&[&FATES[..], &[("image", "its size in the image")]].concat());
        let of = |class: Class| {
            let mut sum = PageStats::default();
            parts
                .iter()
                .filter(|p| p.class == class)
                .for_each(|p| sum += p.stats);
            sum
        };
        let rows = Class::ALL.map(|class| (class.name(), of(class)));
        let most = rows
            .iter()
            .map(|(_, s)| s.total())
            .max()
            .unwrap_or_default()
            .max(1);
        let wide = |n: u64| (BARS.1 - BARS.0) * n as f64 / most as f64;
        for (name, stats) in rows.iter().filter(|(_, s)| s.total() > 0) {
            self.add(text("", (MARGIN, self.at + 14.0), name));
            let mut x = BARS.0;
            for ((class, words), n) in FATES.into_iter().zip(fates(stats)) {
                let bar = rectangle(class, (x, self.at), (wide(n), 14.0));
                self.add(bar.add(title(&format!("{name}: {} {words}", bytes(n)))));
                x += wide(n);
            }
            self.add(rectangle(
                "image",
                (BARS.0, self.at + 15.0),
                (wide(stats.written), 4.0),
            ));
            let told = format!(
                "{} found, {} in the image",
                bytes(stats.total()),
                bytes(stats.written)
            );
            self.add(text("note", (BARS.1 + 10.0, self.at + 14.0), &told));
            self.at += 26.0;
        }
    }

    fn process(&mut self, shown: &Shown, p: &Process) {
        let space = shown.loaded.spaces.get(&p.mm);
        let vmas = space.map(|s| s.vmas.as_slice()).unwrap_or_default();
        let mapped: u64 = vmas.iter().map(Vma::len).fold(0, u64::saturating_add);
        let head = format!(
            "{} {}: {}, {} mapped",
            p.pid(),
            clean(&p.comm),
            count(vmas.len() as u64, "VMA"),
            bytes(mapped)
        );
        self.line("", &head);
        for (vma, x, width) in laid_out(vmas) {
            let class = Class::of(vma);
            let stats = shown.stats(p.mm, vma);
            let body = rectangle(
                class.map_or("elsewhere", Class::short),
                (x, self.at),
                (width, 18.0),
            );
            self.add(body.add(title(&about(vma, &stats))));
            if class.is_some() {
                self.pages(shown, p.mm, vma, (x, width));
            }
        }
        self.at += 36.0;
    }

    /// What became of the pages of a VMA, by address: a pixel shows what most of those
    /// it stands for are.
    fn pages(&mut self, shown: &Shown, mm: u64, vma: &Vma, (x, width): (f64, f64)) {
        let steps = (width.ceil() as u64).max(1);
        let edge =
            |i: u64| vma.start + (u128::from(vma.len()) * u128::from(i) / u128::from(steps)) as u64;
        let fate = |i: u64| {
            let stats = part(shown, mm, vma, edge(i), edge(i + 1));
            let largest = FATES.iter().zip(fates(&stats)).max_by_key(|(_, n)| *n);
            match largest {
                Some(((class, _), 1..)) => *class,
                _ => "none",
            }
        };
        let mut from = 0;
        while from < steps {
            let class = fate(from);
            let to = (from + 1..steps)
                .find(|&i| fate(i) != class)
                .unwrap_or(steps);
            let scale = width / steps as f64;
            let place = (x + from as f64 * scale, self.at + 19.0);
            self.add(rectangle(class, place, ((to - from) as f64 * scale, 8.0)));
            from = to;
        }
    }
}

/// Stored once, the same as a relative's, equal to others, zero: as in [`FATES`].
fn fates(s: &PageStats) -> [u64; 4] {
    let other = s.same + s.parent;
    [
        s.stored.saturating_sub(s.duplicate),
        other,
        s.duplicate,
        s.zero,
    ]
}

/// What is stored of a part of a VMA.
fn part(shown: &Shown, mm: u64, vma: &Vma, start: u64, end: u64) -> PageStats {
    match vma.contents {
        Contents::Object => {
            let moved = |addr: u64| vma.offset.saturating_add(addr - vma.start);
            let id = OBJECT_INDEX | u64::from(vma.object.0);
            shown.pages.stats(id, moved(start)..moved(end))
        }
        _ => shown.pages.stats(mm, start..end),
    }
}

/// Where VMAs lie in the drawing, and how wide they are: each at least visible, if
/// that can be, the rest by size; a hair's breadth between those that do not touch.
fn laid_out(vmas: &[Vma]) -> Vec<(&Vma, f64, f64)> {
    let n = vmas.len().max(1) as f64;
    let least = (ROOM / n / 2.0).min(3.0);
    let gap = (ROOM / n / 8.0).min(1.5);
    let apart = |i: usize| i > 0 && vmas[i - 1].end != vmas[i].start;
    let gaps = (0..vmas.len()).filter(|&i| apart(i)).count() as f64 * gap;
    let total: f64 = vmas.iter().map(|v| v.len() as f64).sum::<f64>().max(1.0);
    let share = ROOM - gaps - least * vmas.len() as f64;
    let mut x = MARGIN;
    vmas.iter()
        .enumerate()
        .map(|(i, vma)| {
            x += if apart(i) { gap } else { 0.0 };
            let width = least + share * vma.len() as f64 / total;
            let from = x;
            x += width;
            (vma, from, width)
        })
        .collect()
}

/// A VMA in words.
fn about(vma: &Vma, stats: &PageStats) -> String {
    let mut told = format!("{:x}-{:x} {}", vma.start, vma.end, bytes(vma.len()));
    if !vma.name.is_empty() {
        told += &format!(" {}", clean(&vma.name));
    }
    for ((_, words), n) in FATES.iter().zip(fates(stats)).filter(|(_, n)| *n > 0) {
        told += &format!(", {} {words}", bytes(n));
    }
    told
}

fn rectangle(class: &'static str, (x, y): (f64, f64), (width, height): (f64, f64)) -> Rectangle {
    Rectangle::new()
        .set("class", class)
        .set("x", round(x))
        .set("y", round(y))
        .set("width", round(width))
        .set("height", round(height))
}

fn text(class: &'static str, (x, y): (f64, f64), words: &str) -> Text {
    Text::new(words)
        .set("class", class)
        .set("x", round(x))
        .set("y", round(y))
}

fn title(words: &str) -> Title {
    Title::new(words)
}

/// A hundredth of a pixel is enough.
fn round(n: f64) -> f64 {
    (n * 100.0).round() / 100.0
}
