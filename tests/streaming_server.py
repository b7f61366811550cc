"""A small HTTP server that streams as OpenAI's API does, and misbehaves on request; for clients, without an engine."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL, CONTEXT = "a-model", 1000
REFUSED, BROKEN, WRONG, CUT, MERGED, MISCOUNTED, ENDLESS = 429, 500, 400, 3001, 3002, 3003, 3004
"""Output tokens that are answered with such a status, or by a stream that is cut off, has many tokens in an event, has one
too few, or never ends."""

TEXT = ' "choices":[{ data: [DONE]'
"""What every token is: nothing that a model says may be taken for the protocol."""


@dataclass(kw_only=True)
class Server:
    """A server that runs, and what it has seen."""

    keys: set[str]
    token_s: float
    most_at_once: int
    """Further requests are refused with 429."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    """The key of each body."""

    times_s: list[float] = field(default_factory=list)
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    """Answers requests."""

    state: Server

    def do_GET(self) -> None:
        card = {"id": MODEL, "metadata": {"max_request_context_length": CONTEXT}}
        self._answer(200 if self._key() in self.state.keys else 401, {"data": [card]})

    def do_POST(self) -> None:
        body, state = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.state
        with state.lock:
            state.bodies.append(body)
            state.users.append(self._key())
            state.times_s.append(time.perf_counter())
            state.now += 1
            status = REFUSED if state.now > state.most_at_once else body["max_tokens"]
        if status in (REFUSED, BROKEN, WRONG):
            error = {"code": "context_length_exceeded", "message": f"the key {self._key()} has sent too much"}
            self._answer(status, {"error": error})
        else:
            self._stream(body["max_tokens"])
        with state.lock:
            state.now -= 1

    def _stream(self, num: int) -> None:
        self.send_response(200)
        self.end_headers()
        for place in range(5 if num in (CUT, ENDLESS) else num % 1000):
            time.sleep(self.state.token_s * (1 + 4 * (place == 0)))
            self._event({"choices": [{"index": 0, "text": TEXT}], "usage": None})
        if num == ENDLESS:
            self.state.closing.wait(20)
        elif num != CUT:
            self._event({"choices": [], "usage": {"completion_tokens": num - (num == MISCOUNTED)}})
            self.wfile.write(b"data: [DONE]\n\n")

    def _key(self) -> str:
        return str(self.headers["Authorization"]).removeprefix("Bearer ")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class Http(ThreadingHTTPServer):
    """Takes many clients at once, and minds none that leaves."""

    request_queue_size = 100

    def handle_error(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(*keys: str, token_s: float = 0.002, most_at_once: int = 1000) -> Iterator[Server]:
    """Serve those keys until the end of the block, and so many requests at once."""
    state = Server(keys=set(keys), token_s=token_s, most_at_once=most_at_once)
    with Http(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state})) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_port}"
        try:
            yield state
        finally:
            state.closing.set()
            http.shutdown()
            thread.join()
