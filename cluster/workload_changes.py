"""Changes to the requests of a workload, each from an iterator to an iterator, so that they compose and a trace of any
length passes through.

Rules:
- Pure; requests come and leave in the order of arrival.
- A change that cannot be made is a ValueError that names the command's option.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from cluster.synthetic import Stream, zipf_shares
from cost_service.traces import MAX_TOKENS, TraceRequest


def within_window(requests: Iterable[TraceRequest], from_s: float, to_s: float) -> Iterator[TraceRequest]:
    """Those that arrive from `from_s` on and before `to_s`, as if they began then."""
    for request in requests:
        if request.arrival_s >= to_s:
            return
        if request.arrival_s >= from_s:
            yield replace(request, arrival_s=request.arrival_s - from_s)


def at_scaled_rate(requests: Iterable[TraceRequest], factor: float) -> Iterator[TraceRequest]:
    """The same requests `factor` times as fast."""
    for request in requests:
        yield replace(request, arrival_s=request.arrival_s / factor)


def mean_rate(requests: Iterable[TraceRequest]) -> float:
    """Arrivals per second from the first to the last one.

    Raises:
        ValueError: They all come at once.
    """
    first_s, last_s, num = 0.0, 0.0, 0
    for num, request in enumerate(requests):
        first_s = first_s if num else request.arrival_s
        last_s = request.arrival_s
    if last_s <= first_s:
        raise ValueError("--rate cannot be met: all requests arrive at once. Give another --trace.")
    return num / (last_s - first_s)


def with_scaled_lengths(requests: Iterable[TraceRequest], factor: float) -> Iterator[TraceRequest]:
    """Lengths times `factor`, rounded, at least 1; so are the blocks of prefix hashes, so that prompts share as much.

    Raises:
        ValueError: A length is above `MAX_TOKENS` then.
    """
    for request in requests:
        if max(request.prompt_tokens, request.output_tokens) * factor > MAX_TOKENS:
            raise ValueError(f"--length-scale makes a request longer than {MAX_TOKENS} tokens: lower it.")
        yield replace(
            request,
            prompt_tokens=max(1, round(request.prompt_tokens * factor)),
            output_tokens=max(1, round(request.output_tokens * factor)),
            hash_tokens=max(1, round(min(request.hash_tokens * factor, MAX_TOKENS))),
        )


def cut(requests: Iterable[TraceRequest], max_tokens: int) -> Iterator[TraceRequest]:
    """At most `max_tokens` per request: prompt and output each keep what the other leaves, and half of it at least."""
    for request in requests:
        if request.prompt_tokens + request.output_tokens <= max_tokens:
            yield request
            continue
        prompt_tokens = min(request.prompt_tokens, max(max_tokens - request.output_tokens, max_tokens // 2))
        yield replace(
            request,
            prompt_tokens=prompt_tokens,
            output_tokens=max_tokens - prompt_tokens,
            prefix_hashes=request.prefix_hashes[: -(-prompt_tokens // request.hash_tokens)],
        )


def within_context(
    requests: Iterable[TraceRequest], context_tokens: int, dropped: Counter[str] | None, *, name: str
) -> Iterator[TraceRequest]:
    """Those of the source of that name that fit into a model's context; with `dropped`, others are counted there instead.

    Raises:
        ValueError: One does not fit, without `dropped`.
    """
    for request in requests:
        num_tokens = request.prompt_tokens + request.output_tokens
        if num_tokens <= context_tokens:
            yield request
        elif dropped is None:
            line = f"line {request.line} of " if request.line else ""
            raise ValueError(
                f"A request in {line}{name} has {num_tokens} tokens and the model's context {context_tokens}: shorten "
                "requests by --max-tokens or --length-scale, or leave long ones out by --bad-requests drop."
            )
        else:
            dropped["context"] += 1


def with_tenants(
    requests: Iterable[TraceRequest], num: int, *, zipf: float, seed: int
) -> Iterator[TraceRequest]:  # fmt: skip
    """Give requests without a tenant one of `num`, the k-th with a share proportional to k ** -zipf of the sessions.

    Requests that share more than the first block of their prompts are a session and stay together; that first block may be
    a system prompt, which all have.
    """
    rng = random.Random(f"{seed}/tenants")
    shares, names = zipf_shares(num, zipf), [f"tenant-{number}" for number in range(num)]
    by_hash: dict[int, str] = {}
    for request in requests:
        if request.tenant:
            raise ValueError("--tenants is for traces without tenants, and this one has them: leave it out.")
        own = request.prefix_hashes[1:]
        tenant = next((by_hash[one] for one in reversed(own) if one in by_hash), None)
        if tenant is None:
            tenant = rng.choices(names, cum_weights=shares)[0]
        for one in own:
            by_hash.setdefault(one, tenant)
        yield replace(request, tenant=tenant)


def with_flood(requests: Iterable[TraceRequest], flood: Stream, *, seed: int) -> Iterator[TraceRequest]:
    """Add a stream's requests between the others; it ends with them at the latest."""
    added = flood.generate(flood.tenant_names(), random.Random(f"{flood.seed + seed}/flood"))
    upcoming = next(added, None)
    for request in requests:
        while upcoming is not None and upcoming.arrival_s < request.arrival_s:
            yield upcoming
            upcoming = next(added, None)
        yield request
