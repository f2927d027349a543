"""A process of uid 65534 with no_new_privs: counts, and sees that it stays who it is."""
import os, sys, time

folder = sys.argv[1]


def who():
    status = open("/proc/self/status").read().splitlines()
    return [line for line in status if line.split(":")[0] in ("Uid", "Gid", "Groups", "NoNewPrivs", "CapEff", "CapPrm")]


before = who()
assert "NoNewPrivs:\t1" in before and os.getresuid() == (65534, 65534, 65534), before
number = 0
with open(folder + "/log", "w", buffering=1) as log:
    while not os.path.exists(folder + "/stop"):
        # Not by /proc here: an open file of it is another test's business.
        assert (os.getresuid(), os.getresgid(), os.getgroups()) == ((65534,) * 3, (65534,) * 3, []), os.getresuid()
        log.write(f"number {number}\n")
        number += 1
        time.sleep(0.002)
    assert who() == before, who()
    log.write(f"end number {number}\n")
