"""How the processes of a run find each other, and how what befalls one of them ends all.

Each of them connects to process 0 before the runtime of JAX starts, which would wait for minutes
for one that is gone, and stays connected until it has ended. The system closes the connection of
one that dies, at any moment, so that process 0 knows at once and tells the others. What one has to
say of its end it gives to process 0, which prints the first such message and no other; all end
with the exit status of that one.
"""

import contextlib
import os
import selectors
import socket
import struct
import sys
import threading
import time
from typing import NoReturn

# What a process says at the end of its connection, and process 0 to each: an exit status, 0 for
# an end without a fault; and that all have met.
MET = 255
LOST = 70
HELLO = struct.Struct("!7sII")
NAME = b"softjax"
# The variable with the descriptor that `softjax.launch` gives: what is read ends when that ends.
LAUNCHER = "SOFTJAX_LAUNCHER"
# For those who come when the run is lost already, and for an answer.
LINGER = 10.0
PAUSE = 0.05


class Meeting:
    """The connections of this process to the others: of process 0 to all, of all to process 0.

    Args:
        address: HOST:PORT at which process 0 can be reached; free again when all have met.
        count: the number of processes, 2 or more.
        index: of this one.
        patience: seconds to wait for the others.

    Raises:
        SystemExit: one of them ended before all had met, or did not come.
        OSError: process 0 cannot listen there.
    """

    def __init__(self, address: str, count: int, index: int, patience: float):
        self.count, self.index = count, index
        self.ending = threading.Lock()
        self.last_words: str | None = None
        self.connections: dict[socket.socket, int] = {}
        host, _, port = address.rpartition(":")
        self.place = host.strip("[]"), int(port)
        (self._come if index else self._receive)(time.monotonic() + patience)
        threading.Thread(target=self._listen if index else self._watch, daemon=True).start()

    def find_service(self) -> None:
        """Waits for the runtime of JAX at the address: it waits longer where it finds nobody."""
        if self.index:
            with contextlib.suppress(OSError):
                _connected(self.place, time.monotonic() + LINGER).close()

    def leave(self) -> None:
        """Ends the connection without a fault: this process is not missed from here on."""
        self.ending.acquire()  # the thread must not take an end for a loss any more
        self._tell(0)
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def fail(self, status: int, words: str) -> NoReturn:
        """Ends all processes with an exit status; process 0 says why, once."""
        if self.index == 0:
            self._end(status, words)
        self.last_words = words
        connection = next(iter(self.connections))
        with contextlib.suppress(OSError):
            connection.sendall(bytes([status]) + words.encode())
            connection.shutdown(socket.SHUT_WR)
        time.sleep(LINGER)  # the thread ends this process when process 0 has heard
        self._end(status, words)

    def name(self, index: int) -> str:
        """As messages have it."""
        return f"process {index} of {self.count}"

    def _receive(self, deadline: float) -> None:
        """Process 0 waits for all others."""
        fault = ""
        with _listener(*self.place) as listener, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ, None)
            while len(self.connections) < self.count - 1 and time.monotonic() < deadline:
                for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                    if key.data is not None:  # nobody says anything before all have met
                        selector.unregister(key.fileobj)
                        found = f"{self.name(key.data)} ended before all had met."
                    elif (came := self._welcome(listener)) is not None:
                        connection, found = came
                        index = self.connections[connection]
                        selector.register(connection, selectors.EVENT_READ, index)
                        if fault:
                            _send(connection, LOST)
                    else:
                        continue
                    if found and not fault:
                        fault = found
                        _print(fault)
                        self._tell(LOST)
                        deadline = min(deadline, time.monotonic() + LINGER)
        missing = set(range(1, self.count)) - set(self.connections.values())
        if missing and not fault:
            fault = f"of {self.count} processes these did not come: {sorted(missing)}."
            _print(fault)
            self._tell(LOST)
        if fault:
            sys.exit(LOST)
        self._tell(MET)

    def _welcome(self, listener: socket.socket) -> tuple[socket.socket, str] | None:
        """The next connection, and what is wrong with it; None for one that is not of a run."""
        connection, _ = listener.accept()
        connection.settimeout(1)
        said = _received(connection, HELLO.size)
        if len(said) < HELLO.size or not said.startswith(NAME):
            connection.close()
            return None
        _, count, index = HELLO.unpack(said)
        wrong = ""
        if count != self.count or not 0 < index < count:
            wrong = f"process {index} of {count} came to {self.name(0)}."
        elif index in self.connections.values():
            wrong = f"two processes say that they are {self.name(index)}."
        _keep(connection)
        self.connections[connection] = index
        return connection, wrong

    def _come(self, deadline: float) -> None:
        """All others come to process 0, and wait until all have met."""
        try:
            connection = _connected(self.place, deadline)
        except OSError as error:
            host, port = self.place
            _print(f"{self.name(self.index)}: no process 0 at {host}:{port}: {error}.")
            sys.exit(LOST)
        _keep(connection)
        self.connections[connection] = 0
        status = None
        with contextlib.suppress(OSError):
            connection.sendall(HELLO.pack(NAME, self.count, self.index))
            connection.settimeout(max(deadline - time.monotonic(), 0) + LINGER)
            status = _received(connection, 1)
        if not status:
            self._lost_first()
        if status[0] != MET:
            sys.exit(status[0])
        connection.settimeout(None)

    def _listen(self) -> None:
        """Waits for the word of process 0, or for its end."""
        connection = next(iter(self.connections))
        status = _received(connection, 1)
        if not status:
            self._lost_first()
        if status[0]:
            self._end(status[0])

    def _lost_first(self) -> NoReturn:
        """One of the others has to say what befell process 0."""
        words = f"lost {self.name(0)}." if self.index == 1 else ""
        self._end(LOST, self.last_words or words)

    def _watch(self) -> None:
        """Process 0 waits for the end of any other."""
        with selectors.DefaultSelector() as selector:
            for connection in self.connections:
                selector.register(connection, selectors.EVENT_READ, connection)
            for _ in self.connections:
                key, _ = selector.select()[0]
                said = _received(key.data)
                if not said:
                    self._end(LOST, f"lost {self.name(self.connections[key.data])}.")
                if said[0]:
                    self._end(said[0], said[1:].decode(errors="replace"))
                selector.unregister(key.fileobj)

    def _end(self, status: int, words: str = "") -> NoReturn:
        """Ends this process, and by process 0 all; the first to come says why."""
        self.ending.acquire()
        if words:
            _print(words)
        if self.index == 0:
            self._tell(status)
        os._exit(status)

    def _tell(self, status: int) -> None:
        for connection in self.connections:
            _send(connection, status)


def _listener(host: str, port: int) -> socket.socket:
    if host in ("127.0.0.1", "localhost"):
        return socket.create_server((host, port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _connected(place: tuple[str, int], deadline: float) -> socket.socket:
    """A connection as soon as somebody listens there."""
    while True:
        try:
            connection = socket.create_connection(place, max(deadline - time.monotonic(), PAUSE))
            # On one machine, a port that nobody listens at may connect to itself.
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(PAUSE)


def _keep(connection: socket.socket) -> None:
    """Something goes to and fro on it every minute, so that nothing between forgets it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


def _send(connection: socket.socket, status: int) -> None:
    with contextlib.suppress(OSError):  # it has gone
        connection.sendall(bytes([status]))


def _received(connection: socket.socket, size: int | None = None) -> bytes:
    """What comes until so many bytes are there, or until the connection ends."""
    data = b""
    with contextlib.suppress(OSError):
        while size is None or len(data) < size:
            part = connection.recv(65536 if size is None else size - len(data))
            if not part:
                break
            data += part
    return data


def _print(words: str) -> None:
    """At once, and whatever another thread is writing; to a disk that is full, not at all."""
    with contextlib.suppress(OSError):
        os.write(2, f"softjax: {words}\n".encode())
