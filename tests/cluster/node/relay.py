"""Carries TCP connections between a machine's loopback device and ours: ``relay.py PID in|out LISTEN TARGET``.

A machine has a network of its own, without a way out. "in": what is on the machine connects to 127.0.0.1:LISTEN there
and reaches 127.0.0.1:TARGET here; "out": the other way about. Started as a script with nothing but the standard
library on its path; it opens nothing but those connections. PID is any process on the machine.
"""

import asyncio
import contextlib
import ctypes
import os
import socket
import sys

CLONE_NEWNET = 0x40000000


def listener(port: int) -> socket.socket:
    """A listening socket on the loopback device of whatever network this process is in; port 0 is any."""
    return socket.create_server(("127.0.0.1", port), backlog=128)


def enter(network: str) -> None:
    """Move this process into a network."""
    libc = ctypes.CDLL(None, use_errno=True)
    opened = os.open(network, os.O_RDONLY)
    if libc.setns(opened, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter the network {network}: {os.strerror(number)}")
    os.close(opened)


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes of one direction, until that side has no more."""
    with contextlib.suppress(ConnectionError):
        while received := await reader.read(2**16):
            writer.write(received)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()


async def serve(opened: socket.socket, target: int) -> None:
    """Carry every connection; whoever cannot be reached is told so by an end of the connection."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(carry(reader, back), carry(there, writer))
        for one in (back, writer):
            one.close()

    async with await asyncio.start_server(connected, sock=opened) as server:
        await server.serve_forever()


def main(pid: str, direction: str, listen: str, target: str) -> None:
    """Open the socket on the one side, then stay on the other."""
    theirs = f"/proc/{pid}/ns/net"
    if direction == "in":
        here = os.open("/proc/self/ns/net", os.O_RDONLY)
        enter(theirs)
        opened = listener(int(listen))
        enter(f"/proc/self/fd/{here}")
    else:
        opened = listener(int(listen))
        enter(theirs)
    print(opened.getsockname()[1], flush=True)
    asyncio.run(serve(opened, int(target)))


if __name__ == "__main__":
    main(*sys.argv[1:5])
