//! The zero test.

use crate::PAGE;

/// How many bytes are looked at between two decisions.
const STEP: usize = 256;

/// Whether all bytes of a page are zero. Ends within the first bytes of nearly
/// every page that is not; else as fast as the cache gives them.
pub fn is_zero(page: &[u8]) -> bool {
    let (first, _) = page.split_at(page.len().min(8));
    if first.iter().any(|&b| b != 0) {
        return false;
    }
    // Words without a branch between them become vector instructions.
    let steps = page.chunks_exact(STEP);
    let rest = steps.remainder();
    let clear = |step: &[u8]| {
        let (words, _) = step.as_chunks::<8>();
        let sum = words.iter().fold(0, |sum, w| sum | u64::from_ne_bytes(*w));
        sum == 0
    };
    let mut steps = steps;
    steps.all(clear) && rest.iter().all(|&b| b == 0)
}

const _: () = assert!(PAGE.is_multiple_of(STEP as u64));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere() {
        let mut page = vec![0; PAGE as usize];
        assert!(is_zero(&page));
        for bit in 0..page.len() * 8 {
            page[bit / 8] = 1 << (bit % 8);
            assert!(!is_zero(&page), "bit {bit}");
            page[bit / 8] = 0;
        }
        assert!(is_zero(&page[..100]) && is_zero(&[]) && is_zero(&page[..STEP + 9]));
        page[STEP + 8] = 1;
        assert!(!is_zero(&page[..STEP + 9]));
    }
}
