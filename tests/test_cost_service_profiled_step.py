"""Goal: tables say of a step what the operators of its profile add up to, and runs of decodes add up exactly.

Method: operator times learned from a made-up profile; the tables against `StepTime` itself; property tests of the grid.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_service.engine_step import EngineBatch
from cost_service.operators import Batch
from cost_service.profiled_step import Grid, ProfiledStep
from cost_service.profiles import load_profiles
from cost_service.step_time import MeasuredModel, StepTime
from tests.test_cost_service_engine_step import drawn
from tests.test_cost_service_evaluate import made_up_profile

GRID = Grid(
    np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 9.0, 30.0]), lambda rows, columns: rows * columns + columns**2
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[MeasuredModel, StepTime, ProfiledStep]:
    folder = made_up_profile(tmp_path_factory.mktemp("profile"), "llama-3.1-8b")
    (model,) = (MeasuredModel.of(profile) for profile in load_profiles(Path(folder)))
    times = StepTime()
    times.fit([model])
    return model, times, ProfiledStep(model.shape, times, sequence_s=0.0)


def test_a_table_says_what_the_operators_add_up_to(learned: tuple[MeasuredModel, StepTime, ProfiledStep]) -> None:
    model, times, step = learned
    errors = []
    for batch in drawn(120, seed=3, longest=2000):
        decodes = (round(batch.decode_tokens / max(1, batch.num_decodes)),) * batch.num_decodes
        whole = Batch(prefills=tuple((new, cached) for cached, new in batch.prefills), decodes=decodes)
        errors.append(abs(step.step_s(*batch) / float(times.predict(model.shape, whole).seconds[0]) - 1.0))
    assert float(np.median(errors)) < 0.02
    assert float(np.quantile(errors, 0.9)) < 0.08


def test_the_host_comes_on_top(learned: tuple[MeasuredModel, StepTime, ProfiledStep]) -> None:
    model, times, step = learned
    hosted = ProfiledStep(model.shape, times, fixed_s=1e-3, sequence_s=1e-5)
    batch = EngineBatch(10, 1000.0, ((0, 50),))
    assert hosted.step_s(*batch) - step.step_s(*batch) == pytest.approx(1e-3 + 11e-5)
    assert hosted.step_s(0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("decodes", "context", "steps"), [(1, 5, 300), (37, 1000, 700), (3000, 16, 9), (8, 200000, 50)]
)
def test_a_run_of_decodes_takes_as_long_as_its_steps(
    learned: tuple[MeasuredModel, StepTime, ProfiledStep], decodes: int, context: int, steps: int
) -> None:
    step = learned[2]
    one_by_one = math.fsum(step.step_s(decodes, decodes * (context + number)) for number in range(steps))
    assert step.decode_run_s(decodes, decodes * context, steps) == pytest.approx(one_by_one, rel=1e-9)


@given(row=st.floats(0.5, 6.0), first=st.floats(0.5, 40.0), num=st.integers(1, 60))
def test_a_grid_adds_up_along_a_row(row: float, first: float, num: int) -> None:
    assert GRID.sum_along(row, first, num) == pytest.approx(
        math.fsum(GRID.at(row, first + i) for i in range(num)), rel=1e-9
    )


def test_a_grid_has_its_knots_values() -> None:
    assert [GRID.at(2.0, column) for column in (1.0, 3.0, 30.0)] == [3.0, 15.0, 960.0]
