"""Goal: what a run says of its requests does not contradict itself, and comes back as it was written."""

import dataclasses

import pytest

from cluster.records import RequestRecord, RunResult

RECORD = RequestRecord(
    request_id="a", tenant="t", arrival_s=0, first_token_s=1, finish_s=2, prompt_tokens=3, output_tokens=4,
    delivered_tokens=4,
)  # fmt: skip


def test_a_record_that_contradicts_itself_is_a_mistake_of_the_engine() -> None:
    with pytest.raises(AssertionError, match="tokens left"):
        dataclasses.replace(RECORD, delivered_tokens=3)
    with pytest.raises(AssertionError, match="without a time"):
        dataclasses.replace(RECORD, first_token_s=None)


def test_a_result_is_read_as_it_was_written() -> None:
    result = RunResult(
        records=[RECORD], run_end_s=2.0, peak_kv_blocks=1, computed_tokens=6, scheduler={"steps": 4.0},
        preemption_costs={"swap": {"measured": 1.0}}, tokens={"a": [1, 2, 3, 4]},
    )  # fmt: skip
    assert RunResult.of(dataclasses.asdict(result)) == result
