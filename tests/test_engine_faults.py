"""Goal: whatever goes wrong with a copy to or from host memory, every token is right: what cannot be loaded is recomputed.

Method: real engines under pressure whose copies go wrong with a chance of 0.2, loads within the step and over a throttled
link; all tokens must equal the run without pressure, and both pools must be empty at the end.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.engine_runs import (
    GREEDY,
    PRESSURE,
    Base,
    assert_nothing_left,
    counters_of,
    differing,
    engine,
    generate,
    scheduler_of,
)
from tests.faults import Fault, FaultyCopier
from tests.test_engine_exactness import worker_connector

pytestmark = pytest.mark.engine

JOBS = GREEDY
SHARE = 0.2


@pytest.mark.parametrize(
    "link",
    [
        pytest.param({}, id="at once"),
        pytest.param({"throttled_link_bytes_per_s": 1e8}, id="over a link", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("fault", Fault)
def test_every_token_is_right_though_copies_go_wrong(
    tiny_model: Path, base: Base, fault: Fault, link: dict[str, Any]
) -> None:
    settings = {"verify_checksums": fault is Fault.WRONG_BYTES, **link}
    with engine(tiny_model, "swap", swap=settings, enable_prefix_caching=False, **PRESSURE) as llm:
        worker = worker_connector()._worker
        faulty = worker._copier = FaultyCopier(worker._copier, fault, share=SHARE)
        tokens = generate(llm, JOBS)
        assert differing(JOBS, tokens, base) == []
        assert faulty.num_faults >= 4
        assert counters_of(llm)["swaps"] >= 20
        needed = sum(len(job.prompt) + job.max_tokens - 1 for job in JOBS)
        assert (scheduler_of(llm).num_scheduled_tokens > needed) == (fault is not Fault.SLOW)  # recomputed, or not
        assert_nothing_left(llm)


def test_bytes_that_changed_in_host_memory_would_reach_the_tokens_without_checksums(
    tiny_model: Path, base: Base
) -> None:
    """Of the method itself: the fault is one that does harm."""
    with engine(tiny_model, "swap", enable_prefix_caching=False, **PRESSURE) as llm:
        copier = worker_connector()._worker._copier
        copy_in = copier.copy_in

        def spoil_and_copy_in(slots: list[int], blocks: list[int], *, synchronous: bool) -> Any:
            for host in copier._host_rows:
                for slot in slots:
                    host[slot] ^= 0x35
            return copy_in(slots, blocks, synchronous=synchronous)

        copier.copy_in = spoil_and_copy_in
        assert differing(JOBS, generate(llm, JOBS), base)


def test_a_host_pool_that_the_host_has_no_room_for_ends_the_start_in_one_sentence(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicas.vllm_swap.available_memory_bytes", lambda: 1_000_000)
    with (
        pytest.raises(ValueError, match=r"host_pool_bytes must fit the host: 0\.1 GB are wanted and 0\.0 GB free\."),
        engine(tiny_model, "swap", **PRESSURE),
    ):
        pass
