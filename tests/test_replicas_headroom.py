"""Goal: blocks are kept free at admission where preemptions cost much, and only there.

Method: steps of given cost; the controller's value by hand, its limits, and where it comes to rest in a closed loop.
"""

import pytest

from replicas.headroom import GAIN_BLOCKS, LARGEST_STEP_SHARE, TARGET_SHARE, Headroom


def test_an_engine_whose_preemptions_cost_nothing_admits_as_vllm_does() -> None:
    headroom = Headroom()
    for _ in range(1000):
        headroom.step(0.0, 0.01, num_running=20)
    for _ in range(1000):
        headroom.step(0.5 * TARGET_SHARE * 0.01, 0.01, num_running=20)
    assert headroom.num_blocks == 0


def test_a_preemption_as_dear_as_a_step_asks_for_so_many_blocks() -> None:
    headroom = Headroom()
    for _ in range(10):
        headroom.step(0.01, 0.01, num_running=20)
    assert headroom.num_blocks == int(10 * GAIN_BLOCKS * (1 - TARGET_SHARE))


def test_one_absurd_price_counts_as_a_few_steps_only() -> None:
    headroom = Headroom()
    headroom.step(1e9, 0.01, num_running=1000)
    assert headroom.num_blocks == int(GAIN_BLOCKS * (LARGEST_STEP_SHARE - TARGET_SHARE))


def test_no_more_than_a_block_for_each_running_request_is_kept_free() -> None:
    headroom = Headroom()
    for _ in range(1000):
        headroom.step(0.1, 0.01, num_running=7)
    assert headroom.num_blocks == 7
    headroom.step(0.0, 0.01, num_running=3)
    assert headroom.num_blocks == 3


def test_what_is_not_needed_any_more_is_given_back_slowly_or_at_once_on_a_reset() -> None:
    headroom = Headroom()
    for _ in range(40):
        headroom.step(0.1, 0.01, num_running=10)
    for _ in range(200):
        headroom.step(0.0, 0.01, num_running=10)
    assert 8 <= headroom.num_blocks < 10
    headroom.reset()
    assert headroom.num_blocks == 0


@pytest.mark.parametrize("price_steps", [0.2, 1.0, 5.0])
def test_in_a_closed_loop_preemptions_come_to_cost_the_share_that_is_worth_having(price_steps: float) -> None:
    """A made-up engine: half as many preemptions with each two blocks, one in five steps with none."""
    headroom, due, cost_s = Headroom(), 0.0, 0.0
    for step in range(20_000):
        due += 0.2 * 0.5 ** (headroom.num_blocks / 2)
        price_s = 0.01 * price_steps if due >= 1.0 else 0.0
        due -= due >= 1.0
        headroom.step(price_s, 0.01, num_running=100)
        cost_s += price_s if step >= 10_000 else 0.0
    assert cost_s / (10_000 * 0.01) == pytest.approx(TARGET_SHARE, rel=0.35)
