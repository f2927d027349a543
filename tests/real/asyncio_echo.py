"""A server and a client, each a process with an event loop, joined by TCP connections.

The client sends numbered lines over several connections and wants each back, until it finds a file `stop`; the number
of the last is in the file `progress`.
"""
import asyncio
import os
import pathlib
import socket
import sys

DIR = pathlib.Path(sys.argv[1])


async def echo(reader, writer):
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def serve(listener):
    server = await asyncio.start_server(echo, sock=listener)
    async with server:
        await server.serve_forever()


async def talk(address, talker):
    reader, writer = await asyncio.open_connection(*address)
    number = 0
    while not (DIR / "stop").exists():
        line = f"{talker} {number} ".encode() + b"x" * (number * 37 % 5000) + b"\n"
        writer.write(line)
        await writer.drain()
        back = await reader.readline()
        if back != line:
            raise SystemExit(f"{talker}: {line[:30]!r} came back as {back[:30]!r}")
        number += 1
        if talker == 0:
            (DIR / "next").write_text(str(number))
            os.rename(DIR / "next", DIR / "progress")
    writer.close()
    await writer.wait_closed()


async def client(address):
    await asyncio.gather(*(talk(address, talker) for talker in range(4)))


listener = socket.create_server(("127.0.0.1", 0))
address = listener.getsockname()
child = os.fork()
if child == 0:
    asyncio.run(serve(listener))
else:
    listener.close()
    asyncio.run(client(address))
    os.kill(child, 15)
    os.waitpid(child, 0)
