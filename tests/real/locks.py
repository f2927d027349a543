"""Holds a flock, a POSIX lock and an OFD lock until it is told to stop."""
import fcntl, os, struct, sys, time

directory = sys.argv[1]
F_OFD_SETLK = 37


def create(name):
    return open(os.path.join(directory, name), "w+")


flock, posix, ofd = create("flock"), create("posix"), create("ofd")
fcntl.flock(flock, fcntl.LOCK_EX)
fcntl.lockf(posix, fcntl.LOCK_EX, 10, 100)
fcntl.fcntl(ofd, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 5, 7, 0))
open(os.path.join(directory, "ready"), "w").close()
while not os.path.exists(os.path.join(directory, "stop")):
    time.sleep(0.002)
for file in flock, posix, ofd:
    file.close()
