"""The FastAPI application that the endpoints are added to: limits on headers, our error shape, and each request's end.

Rule: whatever a request holds (its place under its tenant's caps) is let go at the end of its ASGI call. That comes for
every request, also where an endpoint's own clean-up does not: a stream whose client left before its first byte is never
iterated.
"""

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from cluster.openai_errors import RequestError, internal_error
from cluster.request_checks import RequestLimits, check_headers

logger = logging.getLogger("ray.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_AT_END = "adaptivellm_at_end"


def make_app(limits: RequestLimits) -> FastAPI:
    """Return the application: our error shape, no documentation pages, no CORS."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(HeaderLimits, limits=limits)
    app.add_middleware(RequestEnd)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(404, _on_http_error)
    app.add_exception_handler(405, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    return app


def at_end(request: Request, callback: Callable[[], None]) -> None:
    """Have something called when a request is over: answered, failed or left by its client."""
    request.scope[_AT_END].callback(callback)


class RequestEnd:
    """ASGI middleware: calls at a request's end what was asked for by `at_end`."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as callbacks:
            scope[_AT_END] = callbacks
            await self._app(scope, receive, send)


class HeaderLimits:
    """ASGI middleware: refuses oversized headers before anything reads them."""

    def __init__(self, app: Any, limits: RequestLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                check_headers(scope["headers"], self._limits)
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def error_response(error: RequestError) -> JSONResponse:
    """The response that an error is."""
    return JSONResponse(error.body(), status_code=error.status, headers=dict(error.headers))


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError), type(error)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException) or hasattr(error, "status_code"), type(error)
    status = getattr(error, "status_code", 404)
    message = "There is nothing at this path." if status == 404 else "This path does not take that method."
    return error_response(
        RequestError(status=status, message=message, param=None, code=None, type="invalid_request_error")
    )


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("Unexpected %s while answering", type(error).__name__, exc_info=error)
    return error_response(internal_error())
