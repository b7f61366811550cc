"""Goal: whoever is admitted with all its output reserved gets it, and nobody is preempted.

Method: the peak against requests that are played to their ends token by token; engines with so little memory that vLLM would
preempt.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.records import RequestRecord
from cluster.routing import RoundRobin
from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_reservation import peak_tokens
from cluster.simulated_step import SimulatedSettings
from cluster.simulated_time import LinearTimes
from cluster.simulation import Simulation
from cost_service.traces import TraceRequest

TIMES = LinearTimes(fixed_s=0.01, decode_s=1e-4)
ENGINE = SimulatedSettings(
    num_blocks=101, block_size=1, max_num_seqs=16, max_num_batched_tokens=128, max_model_len=100,
    enable_prefix_caching=False, reserve_output=True,
)  # fmt: skip
REQUESTS = [
    TraceRequest(arrival_s=0.02 * number, tenant="", prompt_tokens=1 + number % 20, output_tokens=1 + 7 * number % 60)
    for number in range(200)
]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8))
def test_the_peak_is_what_requests_hold_when_they_are_played_to_their_ends(progress: list[tuple[int, int]]) -> None:
    held = [
        sum(num_held + step for num_held, num_left in progress if num_left >= step)
        for step in range(1 + max((num_left for _, num_left in progress), default=0))
    ]
    assert peak_tokens(progress) == max(held, default=0)


def served(settings: SimulatedSettings) -> tuple[list[RequestRecord], SimulatedEngine]:
    records: list[RequestRecord] = []
    simulation = Simulation(
        lambda _: SimulatedEngine(settings, TIMES), num_replicas=1, router=RoundRobin(), done=records.append,
        check=True,
    )  # fmt: skip
    simulation.run(REQUESTS)
    return records, simulation.replicas[0].engine


@pytest.mark.parametrize("between", [1, 10])
def test_nobody_is_preempted_where_vllm_would_preempt(between: int) -> None:
    records, engine = served(replace(ENGINE, steps_between_admissions=between))
    assert engine.num_preemptions == 0
    assert {one.delivered_tokens == one.output_tokens for one in records} == {True}
    assert served(replace(ENGINE, reserve_output=False))[1].num_preemptions > 0


def test_strides_change_nothing_where_output_is_reserved() -> None:
    settings = replace(ENGINE, steps_between_admissions=10)
    strided, single = served(settings)[0], served(replace(settings, strides=False))[0]
    assert [one.request_id for one in strided] == [one.request_id for one in single]
    assert [one.finish_s for one in strided] == pytest.approx([one.finish_s for one in single])


def test_nobody_is_admitted_between_two_admissions() -> None:
    first = [one.first_token_s or 0.0 for one in served(replace(ENGINE, steps_between_admissions=10))[0]]
    starts = sorted(set(first))
    alone_s = 10 * 0.01
    late = [after - before >= alone_s * 0.999 for before, after in pairwise(starts)]
    assert sum(late) > 0.9 * len(late)  # all but those that begin when nobody runs any more
