"""Reads five bytes of each file, and five more when it is told to go on."""
import mmap, os, sys, time

directory, paths = sys.argv[1], sys.argv[2:]
files = [open(path, "r+b" if path.endswith("written") else "rb", buffering=0) for path in paths]
first = [file.read(5) for file in files]
maps = [mmap.mmap(file.fileno(), 10, prot=mmap.PROT_READ) for file in files]
for path in paths:
    if path.endswith("deleted"):
        os.unlink(path)
open(os.path.join(directory, "ready"), "w").close()
while not os.path.exists(os.path.join(directory, "go")):
    time.sleep(0.002)
with open(os.path.join(directory, "result.part"), "w") as f:
    for path, file, start, memory in zip(paths, files, first, maps):
        name = os.readlink("/proc/self/fd/%d" % file.fileno())
        whole = (start + file.read(5)).decode()
        f.write("%s %s %s\n" % (name, whole, memory[:10].decode()))
os.rename(os.path.join(directory, "result.part"), os.path.join(directory, "result"))
