//! Benchmarks, each beside the limit it is measured against in the same run:
//! see `README.md` here, and `scripts/bench` for how to run them.
