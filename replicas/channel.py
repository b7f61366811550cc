"""The control channel of one replica: a local, two-way message socket between its server and its engine process.

Rules:
- The engine's end never blocks and never raises for what the peer does: a full queue drops the message and counts it, a
  dead peer looks like a silent one, a message that does not parse is counted and forgotten.
- Queues are bounded on both sides, and an engine takes only a few messages per step.
- The address is a Unix socket in a folder of mode 0700; it travels in an environment variable because vLLM hashes its own
  `additional_config` into the compile cache's key.
"""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from replicas.messages import ToEngine, ToServer, decode_to_engine, decode_to_server, encode

S = TypeVar("S", bound="zmq.Socket[Any]")

CHANNEL_VARIABLE = "ADAPTIVELLM_CHANNEL"
"""Environment variable with the socket's address; set by the replica's server before its engine starts."""

MAX_QUEUED_MESSAGES = 64
MAX_MESSAGES_PER_STEP = 8


class EngineEnd:
    """The engine's end. `receive` and `send` return at once, whatever the peer does."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = _bounded(zmq.Context.instance().socket(zmq.PAIR))
        self._socket.connect(address)
        self.num_dropped = 0
        """Messages that found the queue full."""
        self.num_rejected = 0
        """Messages that did not parse."""

    @classmethod
    def from_environment(cls) -> "EngineEnd | None":
        """Connect to the address in `ADAPTIVELLM_CHANNEL`; None where no server has set one."""
        address = os.environ.get(CHANNEL_VARIABLE)
        return cls(address) if address else None

    def receive(self) -> Iterator[ToEngine]:
        """Yield what has arrived, a few messages at most."""
        for _ in range(MAX_MESSAGES_PER_STEP):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                yield decode_to_engine(data)
            except ValueError:
                self.num_rejected += 1

    def send(self, message: ToServer) -> bool:
        """Queue a message for the server; False when the queue is full."""
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.num_dropped += 1
            return False
        return True

    def close(self) -> None:
        """Close without waiting for what is still queued."""
        self._socket.close(linger=0)


class ServerEnd:
    """The server's end, for an asyncio loop. Creates the socket and its folder."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="adaptivellm-")  # mode 0700
        self.address = f"ipc://{Path(self._folder.name, 'channel')}"
        self._socket = _bounded(zmq.asyncio.Context.instance().socket(zmq.PAIR))
        self._socket.bind(self.address)
        self.num_rejected = 0

    async def receive(self) -> ToServer:
        """Wait for the engine's next message; what does not parse is counted and skipped."""
        while True:
            data = await self._socket.recv()
            try:
                return decode_to_server(data)
            except ValueError:
                self.num_rejected += 1

    async def send(self, message: ToEngine, *, timeout_s: float = 1.0) -> bool:
        """Queue a message for the engine; False when there is no room for `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._socket.send(encode(message)), timeout_s)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Close the socket and remove its folder."""
        self._socket.close(linger=0)
        self._folder.cleanup()


def _bounded(socket: S) -> S:
    socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, MAX_QUEUED_MESSAGES)
    # No ZMQ_MAXMSGSIZE: a message above it ends the connection, and the connecting end (the engine) never comes back.
    # Decoding refuses what is too large, and counts it.
    socket.setsockopt(zmq.LINGER, 0)
    return socket
