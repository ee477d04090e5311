"""Whether the processes of a group run, as their driver hears it.

Ray says when a process has died, but not when one hangs. An actor could answer while it trains if it had a second
thread for that; but then Ray's own thread wakes a hundred times a second to look for signals, and takes the
interpreter's lock from training each time. So a worker trains in the only thread that Ray gives it, and another, which
mostly sleeps, sends a byte now and then.
"""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

__all__ = ["Heartbeats", "Point", "reach_all", "serve_at", "serve_heartbeat"]

Point = tuple[str, int]
"""Address and port."""

_BEAT_SECONDS = 2.0
_REACH_SECONDS = 5.0


def reach_all(points: Mapping[int, Point]) -> tuple[dict[int, socket.socket], dict[int, str]]:
    """Connections to other processes by rank, and for those that are not reached within five seconds why."""
    reached: dict[int, socket.socket] = {}
    unreached: dict[int, str] = {}

    def reach(rank: int) -> None:
        address, port = points[rank]
        try:
            reached[rank] = socket.create_connection((address, port), _REACH_SECONDS)
        except OSError as e:
            unreached[rank] = f"{address}:{port}: {e.strerror or e}"

    with ThreadPoolExecutor(max_workers=64) as pool:
        list(pool.map(reach, points))
    return reached, unreached


def serve_at(address: str) -> socket.socket:
    """A socket that takes connections to `address`, at a free port."""
    return socket.create_server((address, 0), family=_family(address), backlog=1024)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class _Beat(socketserver.BaseRequestHandler):
    """Sends a byte every few seconds until the other end is gone."""

    def handle(self) -> None:
        try:
            while True:
                self.request.sendall(b".")
                time.sleep(_BEAT_SECONDS)
        except OSError:
            pass


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, address: str) -> None:
        self.address_family = _family(address)
        super().__init__((address, 0), _Beat)


def serve_heartbeat(address: str) -> Point:
    """Let whoever connects hear this process, as long as its threads run; returns where.

    Args:
        address: of this machine, that the driver reaches.
    """
    server = _Server(address)
    # It is never asked to end, and need not wake to look.
    threading.Thread(target=server.serve_forever, args=(3600.0,), name="heartbeat", daemon=True).start()
    return address, int(server.server_address[1])


class Heartbeats:
    """What the driver hears of a group.

    It counts looks and not seconds: a driver that was frozen itself, or whose machine slept, must not blame others. A
    connection that breaks is made anew.

    Args:
        points: where each worker is heard, by rank.
    """

    def __init__(self, points: Mapping[int, Point]) -> None:
        self._points = dict(points)
        self._connections: dict[int, socket.socket] = {}
        self._silent: Counter[int] = Counter()
        self.unreached = self._connect()
        """Rank -> why no connection to that worker could be made at first."""

    def look(self) -> dict[int, int]:
        """Rank -> how many looks in a row, this one too, have heard nothing of that worker."""
        self._connect()
        for rank in self._points:
            self._silent[rank] = 0 if self._hears(rank) else self._silent[rank] + 1
        return {rank: looks for rank, looks in self._silent.items() if looks}

    def close(self) -> None:
        """Listen no longer."""
        for connection in self._connections.values():
            connection.close()

    def _connect(self) -> dict[int, str]:
        missing = {rank: point for rank, point in self._points.items() if rank not in self._connections}
        reached, unreached = reach_all(missing)
        for connection in reached.values():
            connection.setblocking(False)
        self._connections |= reached
        return unreached

    def _hears(self, rank: int) -> bool:
        if rank not in self._connections:
            return False
        try:
            if self._connections[rank].recv(4096):
                return True
        except BlockingIOError:  # nothing since the last look
            return False
        except OSError:
            pass
        self._connections.pop(rank).close()
        return False
