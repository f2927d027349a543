//! The names of an image's files.

use crate::ImageId;

/// The metadata file's name: where it is, there is an image.
pub const METADATA: &str = "freezeframe.img";

const TEMPORARY: (&str, &str) = (".freezeframe-", ".tmp");
const PAGES: (&str, &str) = ("pages-", ".img");

/// The name of page file `number` of image `id`.
pub fn pages_name(id: ImageId, number: u32) -> String {
    format!("{}{id}-{number}{}", PAGES.0, PAGES.1)
}

/// The name the metadata has until its rename.
pub(crate) fn temporary_name(id: ImageId) -> String {
    format!("{}{id}{}", TEMPORARY.0, TEMPORARY.1)
}

/// Whose file a directory entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Metadata on its way.
    Temporary(ImageId),
    /// A page file.
    Pages(ImageId),
}

/// Tells our files from others by their name.
pub(crate) fn classify(name: &[u8]) -> Option<Entry> {
    let name = std::str::from_utf8(name).ok()?;
    let inner = |(prefix, suffix)| name.strip_prefix(prefix)?.strip_suffix(suffix);
    if let Some(id) = inner(TEMPORARY) {
        return ImageId::parse(id).map(Entry::Temporary);
    }
    let (id, number) = inner(PAGES)?.split_once('-')?;
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    digits
        .then(|| ImageId::parse(id))
        .flatten()
        .map(Entry::Pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_names_are_recognised() {
        let id = ImageId([0xab; 16]);
        assert_eq!(
            classify(pages_name(id, 12).as_bytes()),
            Some(Entry::Pages(id))
        );
        assert_eq!(
            classify(temporary_name(id).as_bytes()),
            Some(Entry::Temporary(id))
        );
        // CRIU's pages-1.img and a person's own files are not ours to remove.
        for other in [
            "pages-1.img",
            "pages-.img",
            "freezeframe.img",
            "pages-abababab-1.img",
            ".freezeframe-x.tmp",
            "notes.txt",
        ] {
            assert_eq!(classify(other.as_bytes()), None, "{other}");
        }
        assert_eq!(classify(format!("pages-{id}-1.img.bak").as_bytes()), None);
    }
}
