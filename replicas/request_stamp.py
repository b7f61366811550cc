"""What the ingress tells an engine's scheduler about a request: the API's `vllm_xargs`, `extra_args` in the engine.

Rules:
- Clients cannot set it: the ingress refuses the field, and forwards none that it does not know.
- Reading is total, for whoever runs the engine without the ingress may put anything there: a stamp that is none counts as
  no stamp.

What remains of a request that was predicted to have m tokens in the median and u at most (its 0.9-quantile), with n out:
    x - n tokens, with P(length > x) = 0.1 * P(length > n)
its 0.9-quantile, given that it has lasted. The length's distribution is taken to fall exponentially, to a half at m and
from there to a tenth at u:
    x = m + (u - m) * (1 + n / m * log 2 / log 5)    while n < m
    x = n + (u - m) * log 10 / log 5                 after that: the tail forgets
One that has outlived u is taken to last as long again as it has outlived it, at least (lengths have heavier tails than
that, and the prediction was wrong): n - u. Never less than 1, nor more than its limit leaves.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from cost_service.charges import MAX_WEIGHT, MIN_WEIGHT
from cost_service.service_messages import STAMP_TENANT

TENANT, USER, OUTPUT_TOKENS = STAMP_TENANT, "adaptivellm_user", "adaptivellm_output_tokens"
WEIGHT, AGE_S = "adaptivellm_weight", "adaptivellm_age_s"
MAX_OUTPUT_TOKENS = 1 << 31
MAX_AGE_S = 86_400.0

MORE_AT_MEDIAN = math.log(2) / math.log(5)


def make_stamp(
    *,
    tenant: str,
    user: str = "",
    weight: float = 1.0,
    age_s: float = 0.0,
    median_tokens: int,
    upper_tokens: int,
) -> dict[str, str | float | list[int]]:
    """Return the stamp of a request.

    Args:
        tenant: Whose key it came with.
        user: What the client calls one of its own users: an account inside the tenant, and nobody's identity.
        weight: The tenant's.
        age_s: Seconds since it arrived. An age and no time of day, for clocks of hosts differ.
        median_tokens: Output tokens that it has with a probability of a half, at least 1.
        upper_tokens: Output tokens that it has at most, with a probability of 0.9.
    """
    assert 1 <= median_tokens <= upper_tokens < MAX_OUTPUT_TOKENS, f"{median_tokens} and {upper_tokens} tokens"
    assert MIN_WEIGHT <= weight <= MAX_WEIGHT, f"a weight of {weight}"
    assert 0 <= age_s < math.inf, f"an age of {age_s} s"
    return {
        TENANT: tenant,
        USER: user,
        WEIGHT: weight,
        AGE_S: min(age_s, MAX_AGE_S),
        OUTPUT_TOKENS: [median_tokens, upper_tokens],
    }


def tenant_in(extra_args: Mapping[str, Any]) -> str:
    """The tenant; empty without a stamp."""
    return str(extra_args.get(TENANT, ""))


def user_in(extra_args: Mapping[str, Any]) -> str:
    """The account inside the tenant; empty for requests that name none, and without a stamp."""
    return str(extra_args.get(USER, ""))


def weight_in(extra_args: Mapping[str, Any]) -> float:
    """The tenant's weight; 1 without a stamp."""
    weight = extra_args.get(WEIGHT)
    return float(weight) if _is_number(weight) and MIN_WEIGHT <= weight <= MAX_WEIGHT else 1.0


def age_s_in(extra_args: Mapping[str, Any]) -> float:
    """Seconds that a request was old when it was sent to the engine; 0 without a stamp."""
    age_s = extra_args.get(AGE_S)
    return float(age_s) if _is_number(age_s) and 0 <= age_s <= MAX_AGE_S else 0.0


def remaining_tokens(extra_args: Mapping[str, Any], num_output_tokens: int, max_tokens: int) -> int:
    """Output tokens that are predicted to be still to come at most; without a stamp all that the limit leaves.

    For hundreds of requests in a step: comparisons instead of `min` and `max`, which take three times as long.
    """
    limit = max_tokens - num_output_tokens if max_tokens > num_output_tokens else 1
    stamp = extra_args.get(OUTPUT_TOKENS)
    if not _is_prediction(stamp):
        return limit
    median, upper = stamp
    if num_output_tokens < median:
        left = median + (upper - median) * (1.0 + MORE_AT_MEDIAN * num_output_tokens / median) - num_output_tokens
    else:
        left = (upper - median) * (1.0 + MORE_AT_MEDIAN)
    if left < num_output_tokens - upper:
        left = num_output_tokens - upper
    if left >= limit:
        return limit
    return math.ceil(left) if left > 1.0 else 1


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) is float or type(value) is int


def _is_prediction(stamp: Any) -> TypeGuard[list[int]]:
    return (
        type(stamp) is list
        and len(stamp) == 2
        and type(stamp[0]) is type(stamp[1]) is int
        and 1 <= stamp[0] <= stamp[1] < MAX_OUTPUT_TOKENS
    )
