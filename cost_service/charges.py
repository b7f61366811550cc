"""What tenants are charged for: raw totals of what they were given, and how these count as service.

Rules:
- Raw totals are integers, so that sums over replicas and epochs are exact and conservation can be checked to the token.
- Service is one number per total: tokens (input 1, output 2, a cached prefix free), or predicted seconds of engine time.
- Normalised service is service / weight; fairness compares normalised service.

Engines charge and the global scheduler merges by this one definition; neither folder imports the other.

Source: weights 1 and 2 and the cost function as VTC (arXiv:2401.00588), `input_price=1, output_price=2`.
"""

import math
from enum import StrEnum
from typing import NamedTuple

MAX_COUNT = 2**53
"""No raw total may reach this: above it JSON numbers and floats are no longer exact."""

MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e6
"""Range of weights: normalised counters stay far below 2^53 for years of service."""

ANONYMOUS = ""
"""The tenant that all requests without a stamp share."""

SYSTEM = "system"
"""The account that pays for swaps and recomputations; it never waits and takes part in no comparison."""

OTHER_USERS = "other"
"""The user account that a tenant's further users share once it has as many accounts as it may."""


class Account(NamedTuple):
    """Who is charged: a tenant, and one of its users."""

    tenant: str
    user: str = ""


class Served(NamedTuple):
    """Raw amounts of what was given: tokens, and the engine time that they were predicted to take."""

    num_input_tokens: int = 0
    """Prompt tokens that were computed; those of a recomputation are the system's."""

    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache: free, and counted so that prompts add up."""

    num_output_tokens: int = 0
    engine_us: int = 0
    """Predicted microseconds of engine time."""

    def plus(self, other: "Served") -> "Served":
        """Return the sum."""
        return Served(self[0] + other[0], self[1] + other[1], self[2] + other[2], self[3] + other[3])

    def minus(self, other: "Served") -> "Served":
        """Return the difference; its parts may be negative."""
        return Served(*map(int.__sub__, self, other))

    def largest(self, other: "Served") -> "Served":
        """Return the larger of both for every part: of cumulative totals, the later."""
        return Served(*map(max, self, other))

    def checked(self, name: str) -> "Served":
        """Return it if every part is a count.

        Raises:
            ValueError: A part is negative, no integer, or not below 2^53; the message says that `name` is wrong.
        """
        for field, value in zip(self._fields, self, strict=True):
            if type(value) is not int or not 0 <= value < MAX_COUNT:
                raise ValueError(f"{field} of {name} is {value!r}; it must be an integer from 0 up to 2^53.")
        return self


NOTHING = Served()


class ServiceKind(StrEnum):
    """What is equalised between tenants."""

    TOKENS = "tokens"
    SECONDS = "seconds"


class ServiceUnit(NamedTuple):
    """How raw amounts count as service."""

    kind: ServiceKind = ServiceKind.TOKENS
    input_weight: float = 1.0
    """Service of a computed input token; without meaning for seconds."""

    output_weight: float = 2.0

    def service(self, served: Served) -> float:
        """Service in weighted tokens, or in seconds of engine time."""
        if self.kind is ServiceKind.SECONDS:
            return served.engine_us * 1e-6
        return self.input_weight * served.num_input_tokens + self.output_weight * served.num_output_tokens


def checked_weight(weight: float) -> float:
    """Return the weight of a tenant or user.

    Raises:
        ValueError: It is not a number in the range of weights.
    """
    if not (math.isfinite(weight) and MIN_WEIGHT <= weight <= MAX_WEIGHT):
        raise ValueError(f"The weight is {weight!r}; it must be from {MIN_WEIGHT} to {MAX_WEIGHT:.0f}.")
    return float(weight)
