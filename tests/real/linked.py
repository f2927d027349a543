"""Holds a deleted file that has another name, and a lock on one more; tells what it reads when it is asked to."""
import fcntl, os, sys, time

directory = sys.argv[1]
at = lambda name: os.path.join(directory, name)
gone = open(at("gone"), "w+b", buffering=0)
gone.write(b"0123456789")
os.link(at("gone"), at("kept"))
os.unlink(at("gone"))
locked = open(at("locked"), "w")
fcntl.flock(locked, fcntl.LOCK_EX)
open(at("ready"), "w").close()
while not os.path.exists(at("stop")):
    time.sleep(0.002)
gone.seek(0)
same = os.fstat(gone.fileno()).st_ino == os.stat(at("kept")).st_ino
with open(at("result"), "w") as f:
    f.write("%s %s" % (gone.read().decode(), same))
