"""Two processes take turns at a counter in memory they share, and log every value each of them wrote."""
import mmap, os, sys, time

folder = sys.argv[1]
# A view of whole words: struct.pack_into would write zeroes first, which the other process may see.
shared = memoryview(mmap.mmap(-1, 4096)).cast("Q")
child = os.fork()
turn = 0 if child else 1
log = open(f"{folder}/log{turn}", "w", buffering=1)
own = 0
while True:
    value = shared[0]
    if value == 2**64 - 1:
        break
    if value % 2 != turn:
        time.sleep(0.0005)
        continue
    if turn == 0 and os.path.exists(folder + "/stop"):
        shared[0] = 2**64 - 1
        break
    assert value // 2 == own, (value, own)
    log.write(f"turn{turn} {own}\n")
    own += 1
    shared[0] = value + 1
log.write(f"end turn{turn} {own}\n")
log.close()
if child:
    _, status = os.waitpid(child, 0)
    assert status == 0, status
