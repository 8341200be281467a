"""How the processes of a run find each other, and how the failure of one ends all of them.

Each process connects to process 0 before the JAX runtime starts, because the runtime would wait for
minutes for a process that is gone. The connection stays open until the process has ended. If a
process dies, the operating system closes its connection, so that process 0 knows at once and tells
the others. A process that fails sends its error message to process 0. Process 0 prints only the
first such message, and all processes end with the exit status that came with it.
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

# The bytes on a connection are exit statuses: a process sends its own before it ends, 0 without a
# failure, and process 0 sends one to each process. MET means that all processes have connected.
MET = 255
LOST = 70
HELLO = struct.Struct("!7sII")
NAME = b"softjax"
# This environment variable holds the descriptor of a pipe that `softjax.launch` opened. Reading
# from the pipe returns when `softjax.launch` has ended.
LAUNCHER = "SOFTJAX_LAUNCHER"
# Seconds to wait for an answer, and for processes that connect after the run has failed.
LINGER = 10.0
PAUSE = 0.05


class Meeting:
    """The connections of this process: process 0 is connected to all others, the others to it.

    Process 0 listens at the address HOST:PORT, which is free again once all are connected, and may
    raise an OSError. If a process does not connect within `patience` seconds, or ends before all
    have connected, every process ends by SystemExit.
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
        """Waits until the JAX runtime of process 0 listens, so that JAX connects without delay."""
        if self.index:
            with contextlib.suppress(OSError):
                _connected(self.place, time.monotonic() + LINGER).close()

    def leave(self) -> None:
        """Closes the connections without a failure: the others no longer wait for this process."""
        self.ending.acquire()  # from now on the thread must not report a lost process
        self._tell(0)
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def fail(self, status: int, words: str) -> NoReturn:
        """Ends all processes with an exit status; process 0 prints the reason, once."""
        if self.index == 0:
            self._end(status, words)
        self.last_words = words
        connection = next(iter(self.connections))
        with contextlib.suppress(OSError):
            connection.sendall(bytes([status]) + words.encode())
            connection.shutdown(socket.SHUT_WR)
        time.sleep(LINGER)  # the thread ends this process as soon as process 0 has answered
        self._end(status, words)

    def name(self, index: int) -> str:
        """The name of a process in messages."""
        return f"process {index} of {self.count}"

    def _receive(self, deadline: float) -> None:
        """Process 0 waits for all others."""
        fault = ""
        with _listener(*self.place) as listener, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ, None)
            while len(self.connections) < self.count - 1 and time.monotonic() < deadline:
                for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                    if key.data is not None:  # before all have connected, only an end is readable
                        selector.unregister(key.fileobj)
                        found = f"{self.name(key.data)} ended before all had connected."
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
            fault = f"these of the {self.count} processes did not connect: {sorted(missing)}."
            _print(fault)
            self._tell(LOST)
        if fault:
            sys.exit(LOST)
        self._tell(MET)

    def _welcome(self, listener: socket.socket) -> tuple[socket.socket, str] | None:
        """The next connection and its error, if any; None if it is not from softjax."""
        connection, _ = listener.accept()
        connection.settimeout(1)
        said = _received(connection, HELLO.size)
        if len(said) < HELLO.size or not said.startswith(NAME):
            connection.close()
            return None
        _, count, index = HELLO.unpack(said)
        wrong = ""
        if count != self.count or not 0 < index < count:
            wrong = f"process {index} of {count} connected to {self.name(0)}."
        elif index in self.connections.values():
            wrong = f"two processes were started as {self.name(index)}."
        _keep(connection)
        self.connections[connection] = index
        return connection, wrong

    def _come(self, deadline: float) -> None:
        """The other processes connect to process 0, and wait until all have connected."""
        try:
            connection = _connected(self.place, deadline)
        except OSError as error:
            host, port = self.place
            name = self.name(self.index)
            _print(f"{name}: cannot connect to process 0 at {host}:{port}: {error}.")
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
        """Waits for a message from process 0, or for its end."""
        connection = next(iter(self.connections))
        status = _received(connection, 1)
        if not status:
            self._lost_first()
        if status[0]:
            self._end(status[0])

    def _lost_first(self) -> NoReturn:
        """Ends this process after process 0 was lost, which process 1 reports for all others."""
        words = f"lost {self.name(0)}." if self.index == 1 else ""
        self._end(LOST, self.last_words or words)

    def _watch(self) -> None:
        """Process 0 waits for the end of any other process."""
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
        """Ends this process; process 0 ends all. Only the first call prints its reason."""
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
    """A connection to a place, as soon as a process listens there."""
    while True:
        try:
            connection = socket.create_connection(place, max(deadline - time.monotonic(), PAUSE))
            # On one machine, a socket can connect to itself if no process listens at the port.
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(PAUSE)


def _keep(connection: socket.socket) -> None:
    """Sends keep-alive packets every minute, so that no router drops the idle connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


def _send(connection: socket.socket, status: int) -> None:
    with contextlib.suppress(OSError):  # the other process may have ended
        connection.sendall(bytes([status]))


def _received(connection: socket.socket, size: int | None = None) -> bytes:
    """The next `size` bytes, or fewer if the connection ends; without a size, all bytes."""
    data = b""
    with contextlib.suppress(OSError):
        while size is None or len(data) < size:
            part = connection.recv(65536 if size is None else size - len(data))
            if not part:
                break
            data += part
    return data


def _print(words: str) -> None:
    """Prints without a buffer or a lock that another thread may hold; ignores a full disk."""
    with contextlib.suppress(OSError):
        os.write(2, f"softjax: {words}\n".encode())
