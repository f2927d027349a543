//! Making processes for restore shells: clone3 with chosen PIDs, execveat of a memfd.
