//! Descriptors that stand for processes.
