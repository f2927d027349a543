"""Tells of every file made in a directory, by inotify."""
import ctypes, os, select, struct, sys

directory = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
IN_CREATE = 0x100
watched = os.path.join(directory, "watched")
assert libc.inotify_add_watch(fd, watched.encode(), IN_CREATE) >= 0
log = open(os.path.join(directory, "told"), "w")
open(os.path.join(directory, "ready"), "w").close()
poll = select.poll()
poll.register(fd, select.POLLIN)
while not os.path.exists(os.path.join(directory, "stop")):
    if not poll.poll(20):
        continue
    data = os.read(fd, 65536)
    at = 0
    while at < len(data):
        wd, mask, cookie, length = struct.unpack_from("iIII", data, at)
        name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
        log.write("%s\n" % name)
        at += 16 + length
    log.flush()
