//! Tables and trees on a terminal.

use std::io::IsTerminal;

/// The width to wrap at: the terminal's; nothing is wrapped in a file or pipe.
pub(crate) fn width() -> Option<usize> {
    if !std::io::stdout().is_terminal() {
        return None;
    }
    console::Term::stdout()
        .size_checked()
        .map(|(_rows, columns)| usize::from(columns).max(60))
}

/// Lines of a table: columns as wide as their widest cell, two spaces between
/// them, the last column wrapped at `width` under itself.
pub(crate) fn lines(rows: &[Vec<String>], width: Option<usize>) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let widest = |c: usize| {
        let cells = rows.iter().filter_map(|r| r.get(c));
        cells.map(|s| s.chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..columns.saturating_sub(1)).map(widest).collect();
    let indent: usize = widths.iter().map(|w| w + 2).sum();
    let mut out = Vec::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line += &format!("{cell:<width$}  ");
        }
        let last = row
            .get(widths.len())
            .map(String::as_str)
            .unwrap_or_default();
        let room = width
            .and_then(|w| w.checked_sub(indent))
            .filter(|w| *w >= 20);
        for (i, part) in wrap(last, room.unwrap_or(usize::MAX)).iter().enumerate() {
            let head = if i == 0 {
                line.clone()
            } else {
                " ".repeat(indent)
            };
            out.push(format!("{head}{part}").trim_end().to_owned());
        }
    }
    out
}

/// Breaks a text at spaces. Always at least one line.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split(' ') {
        let len = word.chars().count();
        if used > 0 && used + 1 + len > width {
            lines.push(String::new());
            used = 0;
        }
        if let Some(line) = lines.last_mut() {
            if used > 0 {
                line.push(' ');
                used += 1;
            }
            line.push_str(word);
            used += len;
        }
    }
    lines
}

/// Text from an image or a process, with what a terminal would act on made visible.
pub(crate) fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || turns {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Vec<String> {
        cells.iter().map(|c| (*c).to_owned()).collect()
    }

    #[test]
    fn columns_line_up_and_the_last_wraps() {
        let rows = [row(&["a", "one two three four five"]), row(&["bcd", "x"])];
        assert_eq!(
            lines(&rows, Some(26)),
            ["a    one two three four", "     five", "bcd  x"]
        );
        assert_eq!(
            lines(&rows, None),
            ["a    one two three four five", "bcd  x"]
        );
    }

    #[test]
    fn nothing_reaches_the_terminal_raw() {
        assert_eq!(shown("a\x1b[31mb\nc\u{202e}"), "a\\u{1b}[31mb\\nc\\u{202e}");
        assert_eq!(shown("naïve/ファイル"), "naïve/ファイル");
    }
}
