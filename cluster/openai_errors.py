"""The error every bad request is answered with, in OpenAI's shape.

Rules:
- The message is one plain sentence that names the field and the mend; it holds no value of the client's and no text
  of another library's.
- Raised anywhere below the HTTP layer, turned into a response in one place.
"""

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error"
]


class RequestError(Exception):
    """What to answer instead of a completion; its fields do not change after it is made.

    Args:
        status: HTTP status, 400 to 599.
        message: For people; see the module's rules.
        param: Name of the field at fault, or None.
        code: Name of the fault for programs, or None.
        type: OpenAI's class of the fault.
        headers: Extra response headers, such as `WWW-Authenticate` (401) or `Retry-After` (429, 503).
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        type: ErrorType = "invalid_request_error",  # noqa: A002 - OpenAI's name for it
        headers: Mapping[str, str] | None = None,
    ) -> None:
        assert 400 <= status <= 599, status
        # All arguments go to the base class: exceptions are pickled as their class and these.
        super().__init__(status, message, param, code, type, headers)
        self.status: Final = status
        self.message: Final = message
        self.param: Final = param
        self.code: Final = code
        self.type: Final[ErrorType] = type
        self.headers: Final[Mapping[str, str]] = dict(headers or {})

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """Return the JSON body of the response."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str | None = "invalid_value") -> RequestError:
    """Return a 400 for a field that is missing, wrong or not supported."""
    return RequestError(400, message, param, code)


def model_not_found() -> RequestError:
    """Return the 404 for a model that is not served here."""
    return RequestError(404, "The model does not exist: see /v1/models.", "model", "model_not_found")


def over_cap(retry_after_s: float) -> RequestError:
    """Return the 429 for a tenant that has as much in work as it may."""
    assert retry_after_s > 0, retry_after_s
    return RequestError(
        status=429, message="This key's tenant has as many requests in work as it may: send this one again after the "
        "seconds in Retry-After.", param=None, code="rate_limit_exceeded", type="rate_limit_error",
        headers={"Retry-After": str(math.ceil(retry_after_s))},
    )  # fmt: skip


def larger_than_cap(param: str) -> RequestError:
    """Return the 400 for a request that is larger than all that its tenant may have in work."""
    message = f"This request alone is more than its tenant may have in work: shorten {param}, or ask for fewer choices."
    return invalid(param, message, "request_too_large")


def unavailable() -> RequestError:
    """Return the 503 for a request that nobody could take."""
    return RequestError(
        status=503, message="No replica could take the request: try again shortly.", param=None,
        code="service_unavailable", type="server_error", headers={"Retry-After": "1"},
    )  # fmt: skip


def internal_error() -> RequestError:
    """Return the 500 for our own failures."""
    return RequestError(
        status=500, message="The server failed to answer.", param=None, code="internal_error", type="server_error"
    )
