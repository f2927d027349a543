//! What this kernel can do, found by doing it.
