//! Descriptors: their attributes, their passing, what is queued in them.
