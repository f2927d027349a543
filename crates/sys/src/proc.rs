//! What `/proc/PID` tells about a process.
