"""Sends the requests of a workload to a running endpoint over HTTP, each at its arrival, and notes how they went.

Rules:
- Open loop: a request is sent when its arrival has come, whatever is under way. Bodies are made before the run begins.
- Streamed and greedy, with exactly as many output tokens as the request says (`ignore_eos`): a server knows that number.
- Of an answer only times and numbers are kept: the first and the last token's time, and the usage at its end. An event is
  looked at, not parsed, which is what most of the client's processor time would go to.
- Who gets 429 was rejected; who gets another error, a broken or a wrong answer has failed. Both count as unfinished. An
  answer that says that the request itself is wrong ends the run.
- Keys go into headers and nowhere else.
"""

import asyncio
import json
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import aiohttp

from cluster.answers import USAGE
from cluster.prompts import RequestSpec
from cluster.records import RequestRecord

TOKEN, USAGE_EVENT, DONE = b'"choices":[{', USAGE.encode(), b"data: [DONE]"
"""What marks an event with tokens, the one with the usage, and the last one; in a text quotes are escaped."""

TAIL_BYTES = 2048
"""Of an answer, kept to read its usage from."""

CONNECT_TIMEOUT_S = 60.0

SERVED, REJECTED, FAILED, UNFINISHED = "served", "rejected", "failed", "unfinished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where requests go."""

    url: str
    """Without `/v1`."""

    model: str
    context_tokens: int | None
    """Of the longest request, where the server says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRun:
    """How the requests of one run went."""

    records: list[RequestRecord]
    run_end_s: float
    outcomes: dict[str, dict[str, int]]
    """By tenant how many requests were `served`, `rejected`, `failed`, or `unfinished` at the run's limit."""

    latest_send_s: float
    """How long after its arrival a request was sent at most: the client's own delay."""

    client_cpu_s: float
    """Processor time of the client."""

    preempted: dict[str, int] | None = None
    """Swaps and recomputations of all replicas in the run; None where nobody could be asked."""

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> Self:
        """Read what `asdict` has written."""
        return cls(**{**mapping, "records": [RequestRecord(**record) for record in mapping["records"]]})


async def find_endpoint(url: str, keys: Mapping[str, str]) -> Endpoint:
    """Ask a server for its model, with every tenant's key.

    Raises:
        ValueError: It does not answer, serves nothing, or refuses a key.
    """
    timeout = aiohttp.ClientTimeout(total=CONNECT_TIMEOUT_S)
    document: Any = None
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for tenant, key in {key: (tenant, key) for tenant, key in keys.items()}.values():
            try:
                async with session.get(f"{url}/v1/models", headers=_headers(key)) as answer:
                    if answer.status == 401:
                        raise ValueError(f"--serve: the key of tenant {tenant} is refused: give a valid one.")
                    document = await answer.json() if answer.status == 200 else None
            except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError):
                document = None
            if document is None:
                raise ValueError(
                    f"--serve: {url}/v1/models does not answer as OpenAI's API does: start a server there."
                )
    try:
        card = document["data"][0]
        return Endpoint(url=url, model=str(card["id"]), context_tokens=_context_tokens(card))
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"--serve: {url}/v1/models names no model: serve one there.") from None


async def drive(
    endpoint: Endpoint, keys: Mapping[str, str], requests: Sequence[RequestSpec], *, limit_s: float
) -> ServedRun:
    """Send the requests, each at its arrival, and give up after `limit_s` seconds what is unfinished then.

    Args:
        keys: API key by tenant.

    Raises:
        ValueError: The server says that a request is wrong.
    """
    answers = [_Answer(endpoint, request) for request in requests]
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        sent = [asyncio.create_task(answer.take(session, keys[answer.request.tenant], start_s)) for answer in answers]
        done, late = await asyncio.wait(sent, timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION)
        run_end_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()  # raises what ended the run
    outcomes: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys((SERVED, REJECTED, FAILED, UNFINISHED), 0))
    for answer in answers:
        outcomes[answer.request.tenant][answer.outcome] += 1
    return ServedRun(
        records=[answer.record() for answer in answers], run_end_s=run_end_s, outcomes=dict(outcomes),
        latest_send_s=max(answer.late_s for answer in answers), client_cpu_s=cpu_s,
    )  # fmt: skip


class _Answer:
    """One request and what has come back of it."""

    def __init__(self, endpoint: Endpoint, request: RequestSpec) -> None:
        self.request, self.outcome, self.late_s = request, UNFINISHED, 0.0
        self._url, self._body = f"{endpoint.url}/v1/completions", _body(endpoint.model, request)
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._num_events = 0
        self._tail = b""

    async def take(self, session: aiohttp.ClientSession, key: str, start_s: float) -> None:
        """Send the request when it arrives, and read the answer to its end."""
        await asyncio.sleep(self.request.arrival_s - (time.perf_counter() - start_s))
        self.late_s = max(0.0, time.perf_counter() - start_s - self.request.arrival_s)
        try:
            async with session.post(self._url, data=self._body, headers=_headers(key)) as answer:
                if answer.status == 200:
                    async for part in answer.content.iter_any():
                        self._read(part, time.perf_counter() - start_s)
                elif answer.status != 429 and answer.status < 500:
                    raise ValueError(await _refusal(answer, self.request))
                self.outcome = REJECTED if answer.status == 429 else SERVED if self._is_whole() else FAILED
        except (aiohttp.ClientError, TimeoutError):
            self.outcome = FAILED

    def record(self) -> RequestRecord:
        """How it went. Tokens of a whole answer are those of its usage, else those that were seen, an event's as one."""
        request = self.request
        served = self.outcome == SERVED
        num_delivered = request.output_tokens if served else min(self._num_events, request.output_tokens)
        return RequestRecord(
            request_id=request.request_id, tenant=request.tenant, arrival_s=request.arrival_s,
            first_token_s=self._first_s if num_delivered else None, finish_s=self._last_s if served else None,
            prompt_tokens=len(request.prompt_token_ids), output_tokens=request.output_tokens,
            delivered_tokens=num_delivered,
        )  # fmt: skip

    def _read(self, part: bytes, now_s: float) -> None:
        if num_events := part.count(TOKEN):
            self._num_events += num_events
            self._first_s = now_s if self._first_s is None else self._first_s
            self._last_s = now_s
        self._tail = (self._tail + part)[-TAIL_BYTES:]

    def _is_whole(self) -> bool:
        """Whether the answer came to its end with as many tokens as were asked for."""
        if not self._tail.rstrip().endswith(DONE) or self._first_s is None:
            return False
        for event in self._tail.split(b"\n\n"):
            if USAGE_EVENT in event:
                with suppress(ValueError, KeyError, TypeError):
                    usage = json.loads(event.removeprefix(b"data: "))["usage"]
                    return bool(usage["completion_tokens"] == self.request.output_tokens)
        return False


def _body(model: str, request: RequestSpec) -> bytes:
    return json.dumps(
        {
            "model": model, "prompt": list(request.prompt_token_ids), "max_tokens": request.output_tokens,
            "min_tokens": request.output_tokens, "ignore_eos": True, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


async def _refusal(answer: aiohttp.ClientResponse, request: RequestSpec) -> str:
    """One sentence on a request that the server calls wrong, with none of the server's own text but the error's code."""
    code: Any = None
    with suppress(ValueError, KeyError, TypeError, aiohttp.ClientError):
        code = (await answer.json(content_type=None))["error"]["code"]
    named = f" ({code})" if isinstance(code, str) and re.fullmatch(r"\w{1,40}", code) else ""
    sizes = f"{len(request.prompt_token_ids)} prompt and {request.output_tokens} output tokens"
    return f"The server answers {answer.status}{named} to a request of {sizes}: change the workload, or --serve."


def _context_tokens(card: Mapping[str, Any]) -> int | None:
    """What a model's card says of the longest request: vLLM's own field, or Ray's."""
    told = card.get("max_model_len") or (card.get("metadata") or {}).get("max_request_context_length")
    return told if isinstance(told, int) else None
