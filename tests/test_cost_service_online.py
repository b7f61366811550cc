"""Goal: costs are learned from a stream of measurements, whatever is wrong with some of them, and again when they change.

Method: streams drawn from known costs with noise; hypothesis for streams of anything.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_service.hats import hats, value_at
from cost_service.online import FEWEST, NEWEST, OnlineCost

NUM_KNOTS = 10


def linear(blocks: float) -> float:
    return 2e-3 + 1e-4 * blocks


def feed(
    cost: OnlineCost, law: Callable[[float], float], num: int, *, seed: int = 0, noise: float = 0.05
) -> list[float]:
    """Observe copies of 1 to 300 blocks, refit after every eighth; return each one's relative error when it came."""
    rng, errors = np.random.default_rng(seed), []
    for index in range(num):
        blocks = float(np.ceil(np.exp(rng.uniform(0.0, math.log(300.0)))))
        seconds = law(blocks) * math.exp(noise * rng.standard_normal())
        predicted = cost.learned.seconds(np.array([[1.0, blocks]]), np.array([blocks]))[0]
        errors.append(abs(predicted / seconds - 1.0))
        assert cost.observe((1.0, blocks), blocks, seconds)
        if index % 8 == 7:
            cost.refit()
            cost.check()
    return errors


def test_linear_costs_are_found() -> None:
    cost = OnlineCost((1e-2, 1e-5), num_knots=NUM_KNOTS)
    errors = feed(cost, linear, 400)
    assert np.median(errors[-200:]) < 0.06
    assert cost.learned.seconds(np.array([[1.0, 200.0]]), np.array([200.0]))[0] == pytest.approx(
        linear(200.0), rel=0.05
    )
    assert cost.num_changes <= 1  # from the prior to what is measured


def test_what_is_not_linear_in_size_is_learned_beside_and_matters() -> None:
    def law(blocks: float) -> float:
        return linear(blocks) * (3.0 if 8 <= blocks <= 64 else 1.0)

    cost = OnlineCost((2e-3, 1e-4), num_knots=NUM_KNOTS)
    feed(cost, law, 500)
    blocks = np.array([1.0, 2.0, 16.0, 32.0, 256.0])
    features, truth = np.column_stack((np.ones(5), blocks)), np.array([law(b) for b in blocks])
    with_knots = np.abs(cost.learned.seconds(features, blocks) / truth - 1.0)
    without = np.abs(cost.learned.seconds(features, blocks, with_knots=False) / truth - 1.0)
    assert with_knots.max() < 0.2
    assert without.max() > 3 * with_knots.max()


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_after_a_fourfold_change_the_error_is_small_again_within_a_hundred_samples(factor: float) -> None:
    cost = OnlineCost((2e-3, 1e-4), num_knots=NUM_KNOTS)
    feed(cost, linear, 300)
    errors = feed(cost, lambda blocks: factor * linear(blocks), 200, seed=1)
    assert np.median(errors[: NEWEST // 2]) > 0.5
    assert np.median(errors[50:100]) < 0.2
    assert np.median(errors[100:]) < 0.1


def test_outliers_move_nothing() -> None:
    clean, dirty = (OnlineCost((2e-3, 1e-4), num_knots=NUM_KNOTS) for _ in range(2))
    rng = np.random.default_rng(3)
    for index in range(300):
        blocks = float(rng.integers(1, 200))
        seconds = linear(blocks) * math.exp(0.05 * rng.standard_normal())
        clean.observe((1.0, blocks), blocks, seconds)
        dirty.observe((1.0, blocks), blocks, 50.0 * seconds if index % 10 == 0 else seconds)
    features, sizes = np.array([[1.0, 10.0], [1.0, 100.0]]), np.array([10.0, 100.0])
    ratio = dirty.refit().seconds(features, sizes) / clean.refit().seconds(features, sizes)
    assert ratio == pytest.approx(np.ones(2), rel=0.05)


@pytest.mark.parametrize(
    ("features", "size", "seconds"),
    [((1.0,), 1.0, 1.0), ((1.0, math.nan), 1.0, 1.0), ((1.0, -1.0), 1.0, 1.0), ((1.0, 1.0), math.inf, 1.0),
     ((1.0, 1.0), -1.0, 1.0), ((1.0, 1.0), 1.0, math.nan), ((1.0, 1.0), 1.0, 0.0), ((1.0, 1.0), 1.0, -1.0)],
)  # fmt: skip
def test_what_is_no_measurement_is_rejected(features: tuple[float, ...], size: float, seconds: float) -> None:
    cost = OnlineCost((1.0, 1.0), num_knots=NUM_KNOTS)
    assert not cost.observe(features, size, seconds)
    assert cost.num_rejected == 1
    assert cost.refit().num_samples == 0


def test_few_samples_scale_the_prior_and_none_leave_it() -> None:
    cost = OnlineCost((2e-3, 1e-4), num_knots=NUM_KNOTS)
    assert cost.refit().coefficients == (2e-3, 1e-4)
    for blocks in range(1, FEWEST):
        cost.observe((1.0, blocks), blocks, 3 * linear(blocks))
    assert cost.refit().coefficients == pytest.approx((6e-3, 3e-4))


def test_a_term_that_never_occurred_keeps_the_scaled_prior() -> None:
    cost = OnlineCost((1e-3, 1e-4, 7.0), num_knots=NUM_KNOTS)
    for blocks in range(1, 60):
        cost.observe((1.0, blocks, 0.0), blocks, 2 * (1e-3 + 1e-4 * blocks))
    assert cost.refit().coefficients[2] == pytest.approx(14.0, rel=0.1)


@given(
    st.lists(
        st.tuples(st.floats(0.0, 1e6), st.floats(0.0, 1e6), st.floats(1e-9, 1e6)), min_size=1, max_size=120
    )
)  # fmt: skip
def test_any_stream_leaves_costs_that_are_finite_and_not_negative(stream: list[tuple[float, float, float]]) -> None:
    cost = OnlineCost((1e-3, 1e-4), num_knots=NUM_KNOTS)
    for index, (one, size, seconds) in enumerate(stream):
        cost.observe((1.0, one), size, seconds)
        if index % 16 == 15:
            cost.refit()
            cost.check()
    cost.refit()
    cost.check()


@given(st.floats(0.0, 1e9))
def test_the_shares_of_the_knots_add_up_to_one(size: float) -> None:
    (shares,) = hats([size], NUM_KNOTS)
    assert shares.sum() == pytest.approx(1.0 if size > 0.0 else 0.0)
    assert (shares >= 0.0).all()
    weights = [float(number * number) for number in range(NUM_KNOTS)]
    assert value_at(size, weights) == pytest.approx(float(shares @ np.asarray(weights))), "one way and the other"


def test_a_function_of_size_runs_through_its_knots_and_stays_beyond_the_last() -> None:
    weights = [1.0, 3.0, 2.0]
    assert [value_at(size, weights) for size in (1, 2, 4, 1000)] == pytest.approx([1.0, 3.0, 2.0, 2.0])
    assert value_at(math.sqrt(2.0), weights) == pytest.approx(2.0)
    assert value_at(0, weights) == value_at(5, []) == 0.0
