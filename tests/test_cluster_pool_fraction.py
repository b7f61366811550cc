"""Goal: a share of the demand gives the same pool to real and simulated engines, and 0 one that is enough for all."""

import pytest

from cluster.pool_fraction import pool_blocks


def test_a_share_of_the_demand_comes_with_the_null_block_and_holds_the_longest_request() -> None:
    assert pool_blocks(0.4, 101, least=20, ample=500) == 41 + 1
    assert pool_blocks(1.0, 101, least=20, ample=500) == 101 + 1
    assert pool_blocks(0.1, 101, least=20, ample=500) == 20


def test_0_is_enough_for_all() -> None:
    assert pool_blocks(0.0, 101, least=20, ample=500) == 500


@pytest.mark.parametrize("fraction", [-1.0, 1.5, float("nan")])
def test_what_is_no_share_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="--pool-fraction must be between 0 and 1"):
        pool_blocks(fraction, 101, least=20, ample=500)
