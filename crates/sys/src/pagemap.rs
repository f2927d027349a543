//! Which pages of a process are present, swapped, written: PAGEMAP_SCAN and `/proc/PID/pagemap`.
