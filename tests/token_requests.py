"""Requests of the token-level cluster (`token_server.py`), and when they come."""

import random
from dataclasses import dataclass


@dataclass(slots=True)
class Request:
    name: str
    tenant: str
    user: str
    arrival_s: float
    num_prompt: int
    num_output: int
    replica: int = 0
    num_generated: int = 0
    num_computed: int = 0
    charged: bool = False
    finish_s: float = 0.0

    @property
    def num_wanted(self) -> int:
        """Tokens to compute before the next output token."""
        return self.num_prompt + self.num_generated


def arrivals(
    tenant: str, per_s: float, until_s: float, *, num_prompt: int = 128, num_output: int = 128,
    on_off_s: float | None = None, seed: int | None = None, begin_s: float = 0.0, num_users: int = 1,
) -> list[Request]:  # fmt: skip
    """Requests of a tenant: evenly spaced, or Poisson if seeded; on and off in turns if told."""
    chance = random.Random(seed)
    requests: list[Request] = []
    at_s, number = begin_s, 0
    while True:
        at_s += chance.expovariate(per_s) if seed is not None else 1.0 / per_s
        if at_s >= until_s:
            return requests
        if on_off_s is None or int(at_s / on_off_s) % 2 == 0:
            number += 1
            requests.append(
                Request(f"{tenant}-{begin_s}-{number}", tenant, f"u{number % num_users}", at_s, num_prompt, num_output)
            )
