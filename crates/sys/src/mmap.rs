//! Mappings of our own: files to read, pages to share.
