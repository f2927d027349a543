"""A transaction in WAL mode, open until it is told to go on."""
import os, sqlite3, sys, time

directory = sys.argv[1]
path = os.path.join(directory, "data.db")


def say(name, text=""):
    with open(os.path.join(directory, name + ".part"), "w") as f:
        f.write(text)
    os.rename(os.path.join(directory, name + ".part"), os.path.join(directory, name))


def wait(name):
    while not os.path.exists(os.path.join(directory, name)):
        time.sleep(0.002)


db = sqlite3.connect(path, isolation_level=None)
assert db.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
db.execute("CREATE TABLE rows (n INTEGER PRIMARY KEY, text TEXT)")
db.executemany("INSERT INTO rows VALUES (?, ?)", [(n, "before %d" % n) for n in range(500)])
db.execute("BEGIN IMMEDIATE")
db.executemany("INSERT INTO rows VALUES (?, ?)", [(n, "inside %d" % n) for n in range(500, 1500)])
say("ready")
wait("go")
db.executemany("INSERT INTO rows VALUES (?, ?)", [(n, "after %d" % n) for n in range(1500, 2000)])
own = db.execute("SELECT count(*), sum(n) FROM rows").fetchone()
db.execute("COMMIT")
good = db.execute("PRAGMA integrity_check").fetchone()
say("result", "%d %d %s" % (own[0], own[1], good[0]))
wait("stop")
