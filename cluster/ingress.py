"""The HTTP ingress: authenticates, keeps out what a client may not send, forwards to a replica, streams the answer back.

Rules:
- Everything that can be refused is refused here, before an engine sees it, in OpenAI's error shape and naming the field.
- Of the client's request only checked body fields go further: no header, no id, nothing that reaches connector or scheduler.
  What the scheduler is told of it is our own stamp (`replicas.request_stamp`); the salt of its prefix cache is ours too.
- Who somebody is, the key alone says. `user`, or the header for it, names an account inside the key's tenant.
- A replica that is gone before it has said anything has its request sent to another one, once, with its age: no client
  has seen anything of it. One that has refused it, or failed at it, would do so again.
- No error text of Ray's or vLLM's leaves; no prompt and no key is logged.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.llm.ingress import OpenAiIngress

from cluster.answers import AnswerReader, wants_usage, with_usage
from cluster.config import StateArgs
from cluster.http_app import at_end
from cluster.openai_errors import (
    RequestError,
    internal_error,
    invalid,
    larger_than_cap,
    model_not_found,
    over_cap,
    unavailable,
)
from cluster.ray_internals import ChatCompletionRequest, CompletionRequest, ErrorInfo, ErrorResponse
from cluster.request_checks import (
    RequestLimits,
    check_chat,
    check_completion,
    check_content_type,
    parse_body,
    user_of,
)
from cluster.serve_lengths import LengthExchange
from cluster.serve_tenants import LiveTenants
from cluster.serve_weights import WeightTeller
from cluster.stores import open_store
from cluster.tenant_limits import Refusal, Ticket
from cluster.tenant_registry import Tenant
from cost_service.cost_actor import start_cost_actor
from cost_service.metrics import REFUSED_REQUESTS
from cost_service.prompt_text import prompt_size
from cost_service.serve_metrics import LiveCounter
from global_scheduler.fairness_actor import start_fairness_actor
from replicas.request_stamp import make_stamp

logger = logging.getLogger("ray.serve")

PROMPT_FIELDS = {"chat": "messages", "completions": "prompt"}
"""What each of Ray's engine methods calls its prompt in the API."""

ENDPOINTS = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "completions": lambda app: app.post("/v1/completions"),
}


class AdaptiveIngress(OpenAiIngress):
    """Ray's OpenAI ingress with our own front: authentication, checks, error shape, streaming."""

    def __init__(
        self,
        *,
        tenant_by_key_hash: dict[str, str],
        num_ingresses: int,
        max_model_len: int,
        limits: RequestLimits,
        state: StateArgs,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        store = open_store(state)
        # Here, for the ingress runs wherever the application does, and the actors take no request's time.
        start_cost_actor(store)
        start_fairness_actor(store)
        self._tenants = LiveTenants(store, tenant_by_key_hash, num_ingresses=num_ingresses)
        self._max_model_len = max_model_len
        self._limits = limits
        self._lengths = LengthExchange(max_model_len)
        self._refused = LiveCounter(REFUSED_REQUESTS)
        loops = (self._lengths.run(), self._tenants.run(), WeightTeller(self._tenants.weights).run())
        self._loops = [asyncio.create_task(loop) for loop in loops]

    async def check_health(self) -> None:
        """Ray's own, and that what runs beside requests still runs."""
        for loop in self._loops:
            if loop.done():
                loop.result()  # raises what ended it
        await super().check_health()

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        self._authenticate(request)
        cards = await super().models()
        return JSONResponse(cards.model_dump())

    async def model_data(self, request: Request, model: str) -> Response:
        """GET /v1/models/{model}"""
        self._authenticate(request)
        card = self._model_cards.get(model)
        if card is None:
            raise model_not_found()
        return JSONResponse(card.model_dump())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._generate(request, check_chat, ChatCompletionRequest, "chat")

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._generate(request, check_completion, CompletionRequest, "completions")

    async def _generate(self, request: Request, check: Callable[..., Any], parse: Any, method: str) -> Response:
        arrived_s = time.monotonic()
        tenant = self._authenticate(request)
        check_content_type(request.scope["headers"])
        checked = check(
            parse_body(await _read_body(request, self._limits.max_body_bytes), self._limits),
            models=self._model_cards.keys(),
            max_model_len=self._max_model_len,
            limits=self._limits,
        )
        user = user_of(checked, request.scope["headers"])
        ticket = self._admit(request, tenant, checked, PROMPT_FIELDS[method])
        lengths = self._lengths.predictor
        expected = lengths.expect(tenant.name, checked)
        reader = AnswerReader(wants_usage=wants_usage(checked), on_end=partial(lengths.finish, expected))
        stamp = partial(make_stamp, tenant=tenant.name, user=user, weight=tenant.weight, **expected.output_tokens())

        def sent_now() -> dict[str, Any]:
            return {"request_id": uuid.uuid4().hex, "vllm_xargs": stamp(age_s=time.monotonic() - arrived_s)}

        ours = {"cache_salt": self._tenants.cache_salt(tenant.name), **with_usage(checked), **sent_now()}
        try:
            body = parse.model_validate(checked | ours)
        except ValidationError as error:
            raise _invalid_field(error) from None
        try:
            try:
                return await self._forward(body, method, reader, ticket)
            except RayActorError as error:
                logger.warning("A replica is gone (%s): its request is sent again.", type(error).__name__)
                return await self._forward(body.model_copy(update=sent_now()), method, reader, ticket)
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise unavailable() from error
        except RayError as error:
            logger.error("A replica failed before its first answer: %s", type(error).__name__)
            raise unavailable() from error

    def _get_configured_serve_handle(self, model_id: str) -> Any:
        """Ray's handle, answering over a gRPC stream: half the processor time of one Ray object for every token."""
        if model_id not in self._configured_serve_handles:
            handle = super()._get_configured_serve_handle(model_id)
            self._configured_serve_handles[model_id] = handle.options(_by_reference=False)
        return self._configured_serve_handles[model_id]

    def _admit(self, request: Request, tenant: Tenant, checked: Mapping[str, Any], prompt_field: str) -> Ticket:
        """Count a checked request under its tenant's caps until its end."""
        admissions = self._tenants.admissions
        num_prompts, prompt_tokens = prompt_size(checked)
        outcome = admissions.admit(
            tenant.name,
            tenant.limits,
            num_requests=num_prompts * checked.get("n", 1),
            prompt_tokens=num_prompts * prompt_tokens,
            now_s=time.monotonic(),
        )
        if isinstance(outcome, Refusal):
            self._refused.inc(tags={"cap": outcome.cap})
            raise larger_than_cap(prompt_field) if outcome.retry_after_s is None else over_cap(outcome.retry_after_s)
        at_end(request, lambda: admissions.end(outcome, time.monotonic()))
        return outcome

    async def _forward(self, body: Any, method: str, reader: AnswerReader, ticket: Ticket) -> Response:
        # Without the raw request no header reaches the engine (X-Vllm-Priority, X-data-parallel-rank, session ids).
        chunks = self._get_response(body=body, call_method=method, raw_request=None)
        first = await anext(chunks)
        item = first[0] if isinstance(first, list) else first
        if isinstance(item, ErrorResponse):
            raise engine_refusal(item.error, PROMPT_FIELDS[method])
        if not body.stream:
            reader.read_whole([choice.finish_reason for choice in item.choices], item.usage.completion_tokens)
            return Response(item.model_dump_json(), media_type="application/json")
        self._tenants.admissions.start(ticket, time.monotonic())
        return StreamingResponse(_stream(first, chunks, PROMPT_FIELDS[method], reader), media_type="text/event-stream")

    def _authenticate(self, request: Request) -> Tenant:
        """Return the tenant. The scheme is case-insensitive, the key is not."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        tenant = self._tenants.tenant_of(key.strip()) if is_bearer else None
        if tenant is None and is_bearer and not self._tenants.may_know_all:
            raise unavailable()
        if tenant is None:
            raise RequestError(
                status=401,
                message="No valid API key: send it as `Authorization: Bearer <key>`.",
                param=None,
                code="invalid_api_key",
                type="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return tenant


def engine_refusal(error: ErrorInfo, prompt_field: str) -> RequestError:
    """Translate an engine's error into ours: the class of the fault and the field, none of the text.

    Args:
        error: Status in `code`, text in `message`, the field in `param` where vLLM names one.
        prompt_field: What the endpoint calls its prompt.
    """
    status, param = error.code, getattr(error, "param", None)
    if status == 404:
        return model_not_found()
    if not 400 <= status < 500:
        return unavailable() if status == 503 else internal_error()
    if "context length" in error.message or "max_model_len" in error.message or param == "input_tokens":
        message = f"{prompt_field} and max_tokens together are longer than the model's context: shorten one of them."
        return invalid(prompt_field, message, "context_length_exceeded")
    named = param if param and re.fullmatch(r"[\w.\[\]]{1,64}", param) else None
    return invalid(named, f"{named or 'A value in the request'} is not accepted by the model.")


async def _stream(
    first: Any, chunks: AsyncIterator[Any], prompt_field: str, reader: AnswerReader
) -> AsyncIterator[str]:
    """Pass server-sent events on. A failure in mid-stream ends it with an error event and without `[DONE]`."""
    try:
        yield _events(first, prompt_field, reader)
        async for chunk in chunks:
            if events := _events(chunk, prompt_field, reader):
                yield events
    except RequestError as error:
        yield _error_event(error)
    except RayError as error:
        logger.error("A replica failed while streaming: %s", type(error).__name__)
        yield _error_event(unavailable())


def _events(chunk: Any, prompt_field: str, reader: AnswerReader) -> str:
    """The client's events of a chunk."""
    items = chunk if isinstance(chunk, list) else [chunk]
    for item in items:
        if isinstance(item, ErrorResponse):
            raise engine_refusal(item.error, prompt_field)
    return "".join(event for event in items if reader.read(event))


async def _read_body(request: Request, max_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        parts.append(part)
        if size > max_bytes:
            break  # one part over the limit is enough for parse_body to refuse it
    return b"".join(parts)


def _invalid_field(error: ValidationError) -> RequestError:
    """What vLLM's own request model refuses although our checks let it pass."""
    first = error.errors(include_input=False, include_context=False, include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"][:2])
    named = field if re.fullmatch(r"[\w.]{1,64}", field) else None
    return invalid(named, f"{named or 'A field of the request'} is not valid.")


def _error_event(error: RequestError) -> str:
    return f"data: {json.dumps(error.body())}\n\n"
