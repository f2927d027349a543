//! (being written: the modules beside this file are not compiled yet)
