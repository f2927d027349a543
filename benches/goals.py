#!/usr/bin/env python3
"""What the whole commands cost, beside what the machine can do in the same run: medians of alternating
pairs. Builds the release command, measures, prints a table and writes it to benches/results/NAME.md.

    benches/goals.py [--name NAME] [--pairs N] [WHAT...]      WHAT: copy live mix children many memory small
"""

import argparse, datetime, glob, mmap, os, re, shutil, statistics, subprocess, sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOOL = os.path.join(ROOT, "target/release/freezeframe")
PROGRAM = os.path.join(ROOT, "target/debug/ff-program")
MIB, GIB = 1 << 20, 1 << 30
ROWS = []
QUIET = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def row(what, value, goal, met):
    ROWS.append((what, value, goal, "yes" if met else "NO"))
    print(f"{what}: {value} (goal {goal}) {'' if met else '<-- missed'}", flush=True)


def ms(seconds):
    return f"{statistics.median(seconds) * 1e3:.1f} ms ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f})"


def timed(*command):
    start = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    return took


class Target:
    """A process to dump, in a session of its own; `dir` is its directory, `img` the image's."""

    def __init__(self, command, env=None, base="/dev/shm"):
        self.dir = tempfile.mkdtemp(prefix="ff-goals-", dir=base)
        self.img = os.path.join(self.dir, "img")
        environ = dict(os.environ, **(env or {}))
        self.process = subprocess.Popen([*command, self.dir], env=environ, start_new_session=True, cwd="/", **QUIET)
        self.pid = self.process.pid
        self.wait(lambda: os.path.exists(os.path.join(self.dir, "ready")))

    def wait(self, true):
        end = time.time() + 60
        while not true():
            if time.time() > end:
                sys.exit("the target does not get on")
            time.sleep(0.002)

    def dump(self, *options):
        return timed(TOOL, "dump", "-t", str(self.pid), "-D", self.img, *options)

    def gone(self, pids):
        self.process.poll()
        self.wait(lambda: self.process.poll() is not None or True)
        self.wait(lambda: not any(os.path.exists(f"/proc/{p}") for p in pids))

    def restore(self):
        return timed(TOOL, "restore", "-d", "-D", self.img)

    def tree(self):
        found = [self.pid]
        for pid in found:
            for path in glob.glob(f"/proc/{pid}/task/*/children"):
                with open(path) as children:
                    found += [int(c) for c in children.read().split()]
        return found

    def cycle(self, *options):
        pids = self.tree()
        dumped = self.dump(*options)
        self.gone(pids)
        return dumped, self.restore()

    def pause(self):
        """What the program said of its pause is in `frozen` of the report."""
        out = subprocess.run([TOOL, "dump", "-t", str(self.pid), "-D", self.img, "-R", "-v4"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        took = re.search(r"stopped for ([\d.]+)(ms|µs|s)", out.stderr)
        return float(took[1]) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[took[2]]

    def end(self):
        for pid in self.tree():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                pass
        self.process.poll()
        shutil.rmtree(self.dir)


class Gaps(Target):
    """A process that looks at the clock all the time: it knows how long it did not run."""

    def __init__(self, size, **more):
        super().__init__([PROGRAM, "scale::gaps"], {"FF_SIZE": str(size // 1024)}, **more)
        with open(os.path.join(self.dir, "gaps"), "r+b") as file:
            self.words = mmap.mmap(file.fileno(), 4096)

    def get(self, at):
        return int.from_bytes(self.words[at : at + 8], "little")

    def set(self, at, value):
        self.words[at : at + 8] = value.to_bytes(8, "little")

    def on(self):
        before = self.get(8)
        self.wait(lambda: self.get(8) >= before + 3)

    def longest_gap(self, act):
        self.on()
        self.set(0, 0)
        act()
        self.on()
        return self.get(0) / 1e9

    def fork(self):
        self.set(24, 0)
        self.set(16, 1)
        self.wait(lambda: self.get(24))
        return self.get(24) / 1e9


def python(text, **more):
    start = "import os, sys, time, mmap\nd = sys.argv[1]\ndef ready():\n    open(d + '/ready', 'w').close()\ndef private(n):\n    return mmap.mmap(-1, n, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
    return Target([sys.executable, "-c", start + text], **more)


def copy(pairs):
    with open("/dev/shm/ff-goals-source", "wb") as source:
        for _ in range(GIB // (64 * MIB)):
            source.write(os.urandom(64 * MIB))
    target = python(f"m = private({GIB})\nwith open('/dev/shm/ff-goals-source', 'rb') as f: f.readinto(m)\nready()\nwhile True: time.sleep(1)")
    dumps, restores, copies = [], [], []
    for turn in range(pairs + 1):
        took = timed("cp", "/dev/shm/ff-goals-source", "/dev/shm/ff-goals-copy")
        os.unlink("/dev/shm/ff-goals-copy")
        dumped, restored = target.cycle("--no-sync")
        if turn:  # the first has warmed the memory
            copies.append(took), dumps.append(dumped), restores.append(restored)
        shutil.rmtree(target.img)
    target.end()
    os.unlink("/dev/shm/ff-goals-source")
    by = statistics.median(copies)
    print(f"cp of 1 GiB within tmpfs: {ms(copies)}")
    for what, all, goal in [("dump", dumps, 0.95), ("restore", restores, 0.7)]:
        ratio = statistics.median(all) / by
        row(f"{what} of 1 GiB of random memory, tmpfs, against `cp`", f"{ratio:.2f} x: {ms(all)}, cp {ms(copies)}", f"{goal} x", ratio <= goal)


def live(pairs):
    for size in (GIB, 4 * GIB):
        target = Gaps(size)
        forks, pauses = [], []
        for _ in range(pairs):
            forks.append(target.fork())
            pauses.append(target.longest_gap(lambda: target.dump("--live", "--no-sync")))
            shutil.rmtree(target.img)
        target.end()
        goal = 1.3 * statistics.median(forks) + 0.003
        row(f"pause of `dump --live`, {size // GIB} GiB, as the process sees it", f"{ms(pauses)}, a bare fork {ms(forks)}", f"1.3 x fork + 3 ms = {goal * 1e3:.1f} ms", statistics.median(pauses) <= goal)


def mix(pairs):
    text = f"""
paths = sorted(os.path.join(a, f) for a, _, fs in os.walk('/usr/lib/python3.11') for f in fs if f.endswith('.py'))
n = {GIB}
m = private(n)
at = 0
while at < n * 4 // 10: at += m.write(os.urandom(1 << 16))
# Straight into place, so that nothing else holds text.
while at < n * 8 // 10:
    for path in paths:
        with open(path, 'rb', buffering=0) as file: at += file.readinto(memoryview(m)[at : n * 8 // 10])
m.seek(at)
m.write(bytes(n - at))
ready()
while True: time.sleep(1)
"""
    target = python(text, base="/var/tmp")
    plain, packed = [], []
    for turn in range(pairs + 1):
        for all, option, goal in [(plain, "none", 0.81), (packed, "lz4", 0.62)]:
            os.sync()
            took = target.dump("-R", "--compress", option)
            if turn:
                all.append(took)
            size = sum(os.path.getsize(f) for f in glob.glob(target.img + "/*"))
            if turn == pairs:
                row(f"image of 1 GiB (40 % random, 40 % libpython3.11-stdlib, 20 % zeros), {option}", f"{size / GIB:.3f} GiB", f"{goal} GiB", size <= goal * GIB)
            shutil.rmtree(target.img)
    target.end()
    ratio = statistics.median(packed) / statistics.median(plain)
    row("its dump with lz4 against without, both fsynced to disk", f"{ratio:.2f} x: {ms(packed)}, {ms(plain)}", "1 x", ratio <= 1)


def pss(pids):
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            total += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    return total * 1024


def children(pairs):
    target = Target([PROGRAM, "scale::family"], {"FF_SIZE": "100"})
    before = pss(target.tree())
    dumps, restores = zip(*(target.cycle("--no-sync") for _ in range(pairs)))
    after = pss(target.tree())
    size = sum(os.path.getsize(f) for f in glob.glob(target.img + "/*"))
    target.end()
    what = "a parent with 16 MiB of touched memory and 100 children"
    row(f"{what}: image", f"{size / MIB:.1f} MiB", "24 MiB", size < 24 * MIB)
    row(f"{what}: dump", ms(dumps), "150 ms", statistics.median(dumps) < 0.15)
    row(f"{what}: restore", ms(restores), "150 ms", statistics.median(restores) < 0.15)
    row(f"{what}: PSS of the tree", f"{before / MIB:.1f} to {after / MIB:.1f} MiB", "within 20 %", abs(after - before) < 0.2 * before)


def many(pairs):
    for program, size, what, pause_goal, restore_goal in [
        ("mappings", 10000, "10,000 VMAs", 0.06, 0.06),
        ("threads", 1000, "1000 threads", 0.1, 0.1),
        ("descriptors", 5000, "2,500 pipes and socket pairs", 0.1, 0.1),
    ]:
        target = Target([PROGRAM, f"scale::{program}"], {"FF_SIZE": str(size)})
        pauses = [target.pause() for _ in range(pairs)]
        _, restores = zip(*(target.cycle("--no-sync") for _ in range(pairs)))
        target.end()
        row(f"{what}: pause", ms(pauses), f"{pause_goal * 1e3:.0f} ms", statistics.median(pauses) < pause_goal)
        row(f"{what}: restore", ms(restores), f"{restore_goal * 1e3:.0f} ms", statistics.median(restores) < restore_goal)


def small(pairs):
    target = Gaps(MIB, base="/var/tmp")
    pauses, dumps, restores = [], [], []
    for _ in range(4 * pairs):
        pauses.append(target.longest_gap(lambda: dumps.append(target.dump("-R"))))
    for _ in range(4 * pairs):
        restores.append(target.cycle()[1])
    target.end()
    for what, all, goal in [("pause of `dump -R`, as the process sees it", pauses, 0.003), ("`dump -R`, fsynced to disk", dumps, 0.015), ("restore", restores, 0.015)]:
        row(f"a process of 1 MiB: {what}", ms(all), f"{goal * 1e3:.0f} ms", statistics.median(all) < goal)


def memory(_):
    target = Gaps(4 * GIB)
    peak = 0
    for option in ("none", "lz4", "zstd"):
        # Its own peak; a new process begins with that of the memory it was forked from, so a small one starts it.
        command = [TOOL, "dump", "-t", str(target.pid), "-D", target.img, "-R", "--no-sync", "--compress", option]
        wait = "import os, sys; _, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0); print(status, usage.ru_maxrss)"
        status, kib = subprocess.run([sys.executable, "-c", wait, *command], capture_output=True, text=True).stdout.split()
        if status != "0":
            sys.exit(f"{' '.join(command)}: status {status}")
        peak = max(peak, int(kib) * 1024)
        shutil.rmtree(target.img)
    target.end()
    bound = 64 * MIB + 4 * GIB // 200
    row("peak resident memory of the tool, 4 GiB target", f"{peak / MIB:.0f} MiB (code and files included)", f"{bound / MIB:.0f} MiB anonymous", peak <= bound)


def main():
    parts = dict(small=small, copy=copy, live=live, mix=mix, children=children, many=many, memory=memory)
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--name", default=f"goals-{datetime.date.today()}")
    args.add_argument("--pairs", type=int, default=5)
    args.add_argument("what", nargs="*", metavar="WHAT")
    args = args.parse_args()
    build = ["cargo", "build", "--quiet", "--manifest-path", os.path.join(ROOT, "Cargo.toml")]
    subprocess.run([*build, "--release", "-p", "freezeframe-cli"], check=True)
    subprocess.run([*build, "-p", "freezeframe-tests", "--bin", "ff-program"], check=True)
    # Memory that the host has not given to the machine yet makes the first runs slow.
    warm = mmap.mmap(-1, 6 * GIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    warm.close()
    for what in args.what or parts:
        parts[what](args.pairs)
    path = os.path.join(ROOT, "benches/results", args.name + ".md")
    with open("/proc/cpuinfo") as cpus:
        cpu = next(line.split(": ", 1)[1].strip() for line in cpus if line.startswith("model name"))
    with open(path, "w") as table:
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        print(f"# {datetime.date.today()}, {commit}\n", file=table)
        print(f"`{' '.join(['benches/goals.py', *sys.argv[1:]])}` on {os.cpu_count()} CPUs ({cpu}), Linux {os.uname().release}, load {os.getloadavg()[0]:.1f} at the end. Medians (least to most).\n", file=table)
        print("| What | Measured | Goal | Met |\n|---|---|---|---|", file=table)
        for line in ROWS:
            print("| " + " | ".join(line) + " |", file=table)
    print(path)


main()
