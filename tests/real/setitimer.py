"""A handler counts the signals of setitimer; the main program counts the times a sleep ended."""
import os, signal, sys, time

folder = sys.argv[1]
log = open(folder + "/log", "w", buffering=1)
ticks = 0


def tick(_signal, _frame):
    global ticks
    # The handler may be interrupted by itself from the first call on.
    number = ticks
    ticks = number + 1
    os.write(log.fileno(), f"tick {number}\n".encode())


signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
number = 0
while not os.path.exists(folder + "/stop"):
    os.write(log.fileno(), f"main {number}\n".encode())
    number += 1
    time.sleep(0.003)
signal.setitimer(signal.ITIMER_REAL, 0)
os.write(log.fileno(), f"end main {number}\nend tick {ticks}\n".encode())
