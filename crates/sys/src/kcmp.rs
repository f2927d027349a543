//! Whether two tasks share a kernel object.
