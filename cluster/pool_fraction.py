"""What `--pool-fraction` means, for real and for simulated engines.

Rule: KV blocks as a share of the most that were held at once with an unlimited pool; 0 is a pool that is enough for all.
"""

import math

HELP = "KV blocks / peak demand with an unlimited pool, from 0 to 1; 0: enough for all"


def check_pool_fraction(fraction: float) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: It is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"--pool-fraction must be between 0 and 1: it is {fraction}.")


def pool_blocks(fraction: float, demand: float, *, least: int, ample: int) -> int:
    """KV blocks, vLLM's null block included.

    Args:
        demand: Blocks that were held at once.
        least: Of a pool that every single request fits into.
        ample: Of one that is enough for all.
    """
    check_pool_fraction(fraction)
    return max(math.ceil(fraction * demand) + 1, least) if fraction else ample
