"""asyncio with a subprocess over pipes: each number goes to `cat` and comes back; a second task counts by itself."""
import asyncio, os, sys

folder = sys.argv[1]
log = open(folder + "/log", "w", buffering=1)


def stopped():
    return os.path.exists(folder + "/stop")


async def echo():
    child = await asyncio.create_subprocess_exec(
        "/bin/cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    number = 0
    while not stopped():
        child.stdin.write(f"{number}\n".encode())
        await child.stdin.drain()
        line = await child.stdout.readline()
        log.write(f"echo {int(line)}\n")
        number += 1
        await asyncio.sleep(0.002)
    child.stdin.close()
    code = await child.wait()
    assert code == 0, code
    log.write(f"end echo {number}\n")


async def count():
    number = 0
    while not stopped():
        log.write(f"tick {number}\n")
        number += 1
        await asyncio.sleep(0.005)
    log.write(f"end tick {number}\n")


async def main():
    await asyncio.gather(echo(), count())

asyncio.run(main())
