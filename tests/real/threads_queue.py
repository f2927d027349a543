"""Three workers take numbers from a queue; a writer logs each, by the worker that handled it and by its own number."""
import os, queue, sys, threading, time

folder = sys.argv[1]
todo, done = queue.Queue(maxsize=20), queue.Queue()


def work(name):
    own = 0
    while (item := todo.get()) is not None:
        done.put((name, own, item))
        own += 1
    done.put((name, own, None))


def write():
    counts = {}
    ended = 0
    with open(folder + "/log", "w", buffering=1) as log:
        while ended < 3:
            name, own, item = done.get()
            counts[name] = own
            if item is None:
                ended += 1
                log.write(f"end {name} {own}\n")
            else:
                log.write(f"{name} {own}\nitem {item}\n")
        log.write(f"end item {sum(counts.values())}\n")


threads = [threading.Thread(target=work, args=(f"worker{i}",)) for i in range(3)] + [threading.Thread(target=write)]
for thread in threads:
    thread.start()
number = 0
while not os.path.exists(folder + "/stop"):
    todo.put(number)
    number += 1
    time.sleep(0.002)
for _ in range(3):
    todo.put(None)
for thread in threads:
    thread.join()
