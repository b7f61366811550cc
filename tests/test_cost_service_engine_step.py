"""Goal: whole steps of an engine are learned from totals, and a run of decodes adds up as its steps do.

Method: steps drawn from an engine whose rates are known, with noise; property tests of the closed form.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_service.engine_step import EngineBatch, EngineRates, EngineStep
from cost_service.model_shape import ModelShape
from tests.model_configs import CONFIGS

CORE = EngineRates(
    fixed_s=2e-3, sequence_s=4e-5, token_s=2e-5, flops_per_s=4e10, bytes_per_s=1.2e10, attention_flops_per_s=1e10,
    kv_bytes_per_s=4e9, norm=3.0,
)  # fmt: skip
GPU = EngineRates(
    fixed_s=5e-4, sequence_s=2e-6, token_s=1e-7, flops_per_s=5e14, bytes_per_s=2.6e12, attention_flops_per_s=2e14,
    kv_bytes_per_s=1.5e12, norm=4.0,
)  # fmt: skip


def shape(name: str) -> ModelShape:
    return ModelShape.from_config(CONFIGS[name])


def drawn(count: int, *, seed: int, longest: int) -> list[EngineBatch]:
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        decodes = int(rng.integers(0, 33))
        prefills: tuple[tuple[int, int], ...] = ()
        if decodes == 0 or rng.random() < 0.3:
            prefills = tuple(
                (int(rng.integers(0, 64)), int(rng.integers(2, longest))) for _ in range(rng.integers(1, 4))
            )
        batches.append(EngineBatch(decodes, decodes * float(rng.integers(10, longest)), prefills))
    return batches


@pytest.mark.parametrize(("name", "rates", "longest"), [("smollm2-135m", CORE, 500), ("llama-3.1-8b", GPU, 4000)])
def test_steps_are_learned_from_those_of_an_engine(name: str, rates: EngineRates, longest: int) -> None:
    truth = EngineStep(shape(name), rates)
    fitted, rest = drawn(600, seed=1, longest=longest), drawn(200, seed=2, longest=longest)
    noise = np.exp(np.random.default_rng(3).normal(0.0, 0.05, len(fitted)))
    step = EngineStep.fit(shape(name), fitted, truth.estimate(fitted).seconds * noise)
    estimate, measured_s = step.estimate(rest), truth.estimate(rest).seconds
    assert np.median(np.abs(estimate.seconds / measured_s - 1.0)) < 0.02
    assert ((estimate.low_s <= measured_s) & (measured_s <= estimate.high_s)).mean() > 0.9


def test_what_is_odd_about_sizes_is_learned_beside_the_rates() -> None:
    """An engine that is half as fast with more than eight requests, as with another kernel."""
    truth = EngineStep(shape("smollm2-135m"), CORE)

    def seconds(batches: list[EngineBatch]) -> np.ndarray:
        slower = np.array([2.0 if batch.num_decodes > 8 else 1.0 for batch in batches])
        return truth.estimate(batches).seconds * slower

    fitted, rest = drawn(800, seed=4, longest=300), drawn(200, seed=5, longest=300)
    step = EngineStep.fit(shape("smollm2-135m"), fitted, seconds(fitted))
    assert np.median(np.abs(step.estimate(rest).seconds / seconds(rest) - 1.0)) < 0.12


@pytest.mark.parametrize("name", ["smollm2-135m", "mistral-7b-v0.1", "deepseek-v2-lite"])
def test_one_step_costs_the_same_alone_and_among_many(name: str) -> None:
    step = EngineStep(shape(name), GPU)
    batches = drawn(40, seed=6, longest=9000)
    many = step.estimate(batches).seconds
    assert [step.step_s(*batch) for batch in batches] == pytest.approx(list(many), rel=1e-9)


@given(
    name=st.sampled_from(["smollm2-135m", "mistral-7b-v0.1"]),
    decodes=st.integers(1, 300),
    context=st.integers(1, 9000),
    steps=st.integers(0, 60),
)
def test_a_run_of_decodes_takes_as_long_as_its_steps(name: str, decodes: int, context: int, steps: int) -> None:
    step = EngineStep(shape(name), GPU)
    one_by_one = math.fsum(step.step_s(decodes, decodes * (context + number)) for number in range(steps))
    assert step.decode_run_s(decodes, decodes * context, steps) == pytest.approx(one_by_one, rel=1e-9)


def test_a_step_without_tokens_takes_no_time() -> None:
    step = EngineStep(shape("smollm2-135m"), CORE)
    assert step.step_s(0, 0.0) == 0.0
    assert step.decode_run_s(0, 0.0, 5) == 0.0


def test_ranks_share_the_work_and_pay_for_what_they_send() -> None:
    alone, shared = (EngineStep(shape("llama-3.1-8b"), GPU, parallelism=ranks) for ranks in (1, 2))
    long = ((0, 8192),)
    assert alone.step_s(0, 0.0, long) / 2 < shared.step_s(0, 0.0, long) < alone.step_s(0, 0.0, long)


@pytest.mark.parametrize("seconds", [[], [math.nan], [0.0], [-1.0]])
def test_seconds_that_are_none_are_refused(seconds: list[float]) -> None:
    batches = [EngineBatch(1, 10.0)] * len(seconds)
    with pytest.raises(ValueError, match="must be finite and above 0"):
        EngineStep.fit(shape("smollm2-135m"), batches, np.array(seconds))
