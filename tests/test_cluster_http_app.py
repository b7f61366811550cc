"""Goal: every request's end is noticed, however it ends, and errors have one shape.

Method: the application itself with endpoints of the test's own, called as an ASGI server does, with clients that stay, fail
or leave at each point where they can.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from cluster.http_app import at_end, make_app
from cluster.openai_errors import RequestError, over_cap
from cluster.request_checks import RequestLimits
from cluster.tenant_limits import Admissions, TenantLimits, Ticket


class Client:
    """One HTTP client of an application: posts, and leaves after so many messages of the answer."""

    def __init__(self, leaves_after: int | None = None) -> None:
        self.leaves_after = leaves_after
        self.messages: list[MutableMapping[str, Any]] = []
        self.has_left = asyncio.Event()
        self.is_sent = False
        self._leave_if_due()

    def _leave_if_due(self) -> None:
        if self.leaves_after is not None and len(self.messages) >= self.leaves_after:
            self.has_left.set()

    async def receive(self) -> dict[str, Any]:
        if not self.is_sent:
            self.is_sent = True
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self.has_left.is_set():
            raise OSError("the client has left")
        self.messages.append(message)
        self._leave_if_due()
        await asyncio.sleep(0)

    async def post(self, app: FastAPI, path: str) -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        await app(scope, self.receive, self.send)


class Endpoints:
    """An application whose requests are admitted under a cap of one."""

    def __init__(self) -> None:
        self.app = make_app(RequestLimits())
        self.admissions = Admissions(num_ingresses=1)
        for path in ("whole", "stream", "broken", "error", "bug", "hang"):
            self.app.post(f"/{path}")(getattr(self, path))

    def admit(self, request: Request) -> None:
        limits = TenantLimits(max_concurrent_requests=1, max_queued_requests=1, max_queued_tokens=5)
        outcome = self.admissions.admit("a", limits, num_requests=1, prompt_tokens=5, now_s=0.0)
        if not isinstance(outcome, Ticket):
            assert outcome.retry_after_s is not None
            raise over_cap(outcome.retry_after_s)
        at_end(request, lambda: self.admissions.end(outcome, 1.0))

    async def whole(self, request: Request) -> Response:
        self.admit(request)
        return Response("{}")

    async def stream(self, request: Request) -> Response:
        self.admit(request)
        return StreamingResponse(self.events(fail=False))

    async def broken(self, request: Request) -> Response:
        self.admit(request)
        return StreamingResponse(self.events(fail=True))

    async def error(self, request: Request) -> Response:
        self.admit(request)
        raise RequestError(400, "No.")

    async def bug(self, request: Request) -> Response:
        self.admit(request)
        raise KeyError("secret")

    async def hang(self, request: Request) -> Response:
        self.admit(request)
        await asyncio.Event().wait()
        raise AssertionError("never")

    async def events(self, *, fail: bool) -> AsyncIterator[str]:
        for number in range(5):
            await asyncio.sleep(0)
            if fail and number == 2:
                raise RuntimeError("mid-stream")
            yield f"data: {number}\n\n"

    @property
    def in_work(self) -> tuple[int, int, int]:
        load = self.admissions.load("a")
        return load.concurrent_requests, load.queued_requests, load.queued_tokens


@pytest.mark.parametrize("path", ["whole", "stream", "broken", "error", "bug"])
@pytest.mark.parametrize("leaves_after", [None, 0, 1, 2, 4])
def test_nothing_stays_in_work_however_a_request_ends(path: str, leaves_after: int | None) -> None:
    async def scenario() -> None:
        endpoints = Endpoints()
        for _ in range(3):  # under a cap of one, the second would be refused if the first had left anything
            client = Client(leaves_after)
            with contextlib.suppress(Exception):  # what the server above gets to see
                await client.post(endpoints.app, f"/{path}")
            assert endpoints.in_work == (0, 0, 0)
            assert all(message.get("status") != 429 for message in client.messages)

    asyncio.run(scenario())


def test_nothing_stays_in_work_when_the_server_cancels_a_request() -> None:
    async def scenario() -> None:
        endpoints = Endpoints()
        task = asyncio.create_task(Client().post(endpoints.app, "/hang"))
        while endpoints.in_work != (1, 1, 5):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert endpoints.in_work == (0, 0, 0)

    asyncio.run(scenario())


def test_over_a_cap_the_answer_is_429_with_retry_after_in_openai_shape() -> None:
    async def scenario() -> None:
        endpoints = Endpoints()
        first = asyncio.create_task(Client().post(endpoints.app, "/hang"))
        while endpoints.in_work != (1, 1, 5):
            await asyncio.sleep(0)
        second = Client()
        await second.post(endpoints.app, "/whole")
        start, body = second.messages
        assert start["status"] == 429
        assert int(dict(start["headers"])[b"retry-after"]) >= 1
        assert b'"type":"rate_limit_error"' in body["body"]
        assert b'"code":"rate_limit_exceeded"' in body["body"]
        assert endpoints.in_work == (1, 1, 5), "who is refused counts nowhere"
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/nothing", "/docs", "/openapi.json"])
def test_what_is_not_there_is_404_in_openai_shape(path: str) -> None:
    client = Client()
    asyncio.run(client.post(Endpoints().app, path))
    start, body = client.messages
    assert start["status"] == 404
    assert body["body"].startswith(b'{"error":{"message":"There is nothing at this path."')
