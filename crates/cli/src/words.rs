//! Numbers as people read them.

use std::time::Duration;

/// `1 process`, `2 processes`.
pub(crate) fn count(n: u64, what: &str) -> String {
    let ending = match what.as_bytes().last() {
        _ if n == 1 => "",
        Some(b's') => "es",
        _ => "s",
    };
    format!("{n} {what}{ending}")
}

/// `812 B`, `4 KiB`, `1.5 MiB`.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 10.0 && value.fract() > 0.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// `850 us`, `2.4 ms`, `1.25 s`.
pub(crate) fn time(t: Duration) -> String {
    match t.as_micros() {
        us @ 0..1000 => format!("{us} us"),
        us @ 1000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        us => format!("{:.2} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_people_read_them() {
        assert_eq!(count(1, "process"), "1 process");
        assert_eq!(count(2, "process"), "2 processes");
        assert_eq!(count(0, "thread"), "0 threads");
        assert_eq!(bytes(812), "812 B");
        assert_eq!(bytes(4096), "4 KiB");
        assert_eq!(bytes(3 << 19), "1.5 MiB");
        assert_eq!(bytes(100 << 20), "100 MiB");
        assert_eq!(time(Duration::from_micros(2400)), "2.4 ms");
    }
}
