"""Prompts for requests of which only lengths are known: token ids from a seed, equal where prefixes are to be equal.

Rules:
- Pure, and the same anywhere: all chance comes from `random.Random`, one per request and one per prefix hash.
- A prefix hash stands for the same `hash_tokens` tokens in every prompt; what no hash covers is the request's own.
- A source that makes its prompts up itself keeps them: cut where its request is shorter, continued where it is longer.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cost_service.traces import TraceRequest

FIRST_TOKEN_ID = 3
"""Token ids below it are special (padding, start, end) in most vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """One request, before any engine has seen it."""

    request_id: str
    tenant: str
    arrival_s: float
    prompt_token_ids: tuple[int, ...]
    output_tokens: int
    """Tokens to generate, neither more nor fewer."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.prompt_token_ids) + self.output_tokens


def with_prompts(requests: Iterable[TraceRequest], *, vocab: int, seed: int = 0) -> Iterator[RequestSpec]:
    """Give every request an id, by its place, and a prompt of token ids below `vocab`.

    Raises:
        ValueError: The vocabulary is too small.
    """
    check_vocab(vocab)
    for number, request in enumerate(requests):
        yield RequestSpec(
            request_id=f"request-{number}",
            tenant=request.tenant,
            arrival_s=request.arrival_s,
            prompt_token_ids=_prompt(request, vocab, seed, number),
            output_tokens=request.output_tokens,
        )


def check_vocab(vocab: int) -> None:
    """Hold a vocabulary to what prompts need.

    Raises:
        ValueError: It is too small or too large.
    """
    if not FIRST_TOKEN_ID < vocab <= 1 << 31:
        raise ValueError(f"Workload key vocab must be above {FIRST_TOKEN_ID}, and at most 2^31.")


def draw_token_ids(rng: random.Random, num: int, vocab: int) -> list[int]:
    """As many calls of `rng.randrange(FIRST_TOKEN_ID, vocab)`, from the same words of the generator read at once.

    `randrange` takes the upper bits of one 32-bit word, and the next word where they are not below its width.
    """
    width = vocab - FIRST_TOKEN_ID
    drawn: list[int] = []
    while missing := num - len(drawn):
        words = np.frombuffer(rng.getrandbits(32 * missing).to_bytes(4 * missing, "little"), dtype="<u4")
        words = words >> (32 - width.bit_length())
        drawn += (words[words < width] + FIRST_TOKEN_ID).tolist()
    return drawn


def with_other_tokens(requests: Iterable[RequestSpec], vocab: int, rng: random.Random) -> list[RequestSpec]:
    """The same requests in other words: token ids are exchanged one for one, so that what was equal among them stays equal.

    What a prefix cache knows of earlier ones does not serve these.

    Args:
        vocab: Ids from `FIRST_TOKEN_ID` up to below it are exchanged; others stay.
    """
    check_vocab(vocab)
    others = list(range(FIRST_TOKEN_ID, vocab))
    rng.shuffle(others)
    table = [*range(FIRST_TOKEN_ID), *others]
    return [
        replace(request, prompt_token_ids=tuple(table[one] if one < vocab else one for one in request.prompt_token_ids))
        for request in requests
    ]


def _prompt(request: TraceRequest, vocab: int, seed: int, number: int) -> tuple[int, ...]:
    prompt = list(request.prompt_token_ids[: request.prompt_tokens])
    for prefix_hash in request.prefix_hashes:
        if (missing := request.prompt_tokens - len(prompt)) == 0:
            break
        block = random.Random(f"{seed}/hash/{prefix_hash}")
        prompt += draw_token_ids(block, min(request.hash_tokens, missing), vocab)
    own = random.Random(f"{seed}/request/{number}")
    return (*prompt, *draw_token_ids(own, request.prompt_tokens - len(prompt), vocab))
