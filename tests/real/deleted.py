"""Goes on writing to files that were deleted, one of them mapped, and to one in a directory that is gone."""
import mmap, os, shutil, sys, tempfile, time

directory = sys.argv[1]
plain = open(os.path.join(directory, "log-of-old"), "w+")
os.unlink(plain.name)
mapped = open(os.path.join(directory, "mapped"), "w+b")
mapped.truncate(mmap.PAGESIZE)
memory = mmap.mmap(mapped.fileno(), mmap.PAGESIZE)
os.unlink(mapped.name)
temporary = tempfile.TemporaryFile(dir=directory)
below = os.path.join(directory, "gone")
os.mkdir(below)
inside = open(os.path.join(below, "inside"), "w+")
os.chdir(below)
shutil.rmtree(below)
n = 0
while not os.path.exists(os.path.join(directory, "stop")):
    plain.write("%d\n" % n)
    plain.flush()
    inside.write("%d\n" % n)
    inside.flush()
    temporary.write(b"%d\n" % n)
    temporary.flush()
    memory[:8] = n.to_bytes(8, "little")
    n += 1
    with open(os.path.join(directory, "count.part"), "w") as f:
        f.write(str(n))
    os.rename(f.name, os.path.join(directory, "count"))
    time.sleep(0.001)
wanted = "".join("%d\n" % i for i in range(n))
faults = []
for file in plain, inside:
    file.seek(0)
    if file.read() != wanted:
        faults.append(file.name)
temporary.seek(0)
if temporary.read() != wanted.encode():
    faults.append("temporary")
mapped.seek(0)
if int.from_bytes(mapped.read(8), "little") != n - 1:
    faults.append("mapped")
if not os.readlink("/proc/self/cwd").endswith("gone (deleted)"):
    faults.append("working directory")
with open(os.path.join(directory, "result"), "w") as f:
    f.write(" ".join(faults) or "good %d" % n)
