"""Goal: the bugs that a swapping engine is prone to do not go unseen.

Method: one list of checks around a real engine under pressure. They pass as the engine is; with each of ten bugs planted,
one at a time, at least one of them must fail. Whoever adds a way to be wrong adds a bug here.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replicas.preemption_cost import Candidate
from tests.engine_runs import GREEDY, PRESSURE, Base, Stepper, assert_nothing_left, engine, scheduler_of
from tests.test_engine_exactness import worker_connector
from tests.test_engine_policies import COSTS

pytestmark = pytest.mark.engine

JOBS = GREEDY[:45]


def check_engine(llm: Any, base: Base) -> None:
    """Run under pressure, abort somebody who is swapped out, and look at everything.

    Raises:
        AssertionError: Something is not as it should be.
    """
    scheduler = scheduler_of(llm)
    planner, preempt, schedule = scheduler._swap.planning, scheduler._preempt_request, scheduler.schedule
    first: list[Any] = []

    def watched_schedule(*args: Any, **kwargs: Any) -> Any:
        first[:] = scheduler.running[:1] if len(scheduler.running) > 1 else []
        return schedule(*args, **kwargs)

    def watched_preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        assert request not in first, "who came first gave way while there was another"
        preempt(request, *args, **kwargs)

    def no_copy_failed(slots: Any) -> list[str]:
        raise AssertionError(f"slots {slots} do not hold what they should")

    scheduler.schedule, scheduler._preempt_request = watched_schedule, watched_preempt
    planner.copies_failed = no_copy_failed
    stepper = Stepper(llm, JOBS)
    aborted: set[int] = set()
    while stepper.busy:
        stepper.step()
        if stepper.swapped_out and len(aborted) < 3:
            victim = stepper.swapped_out[0]
            aborted.add(victim)
            stepper.abort([victim])
        planner.pool.check()
        scheduler.preemptor.meter.check()
    assert len(aborted) == 3
    assert scheduler.preemptor.num_preemptions["swap"] >= 10
    for index, tokens in stepper.tokens.items():
        assert tokens == base[JOBS[index]], f"job {index} has other tokens"
    assert_nothing_left(llm)


def check_salt(llm: Any) -> None:
    """A prompt is not answered from the blocks of the same prompt under another salt, but is from its own."""
    from vllm import TokensPrompt

    def num_cached(salt: str) -> int:
        prompt = TokensPrompt(prompt_token_ids=list(range(3, 103)), cache_salt=salt)
        (output,) = llm.generate([prompt], [JOBS[0].sampling_params()], use_tqdm=False)
        return int(output.num_cached_tokens)

    assert num_cached("one") == 0
    assert num_cached("one") > 0
    assert num_cached("another") == 0, "blocks of another salt were used"


def plant_free_before_copy(llm: Any, patch: Callable[..., None]) -> None:
    copier = worker_connector()._worker._copier
    copy_out = copier.copy_out

    def too_late(blocks: list[int], slots: list[int]) -> None:
        for rows in copier._device_rows:
            rows[blocks] = 0x47  # somebody else has them by now
        copy_out(blocks, slots)

    patch(copier, "copy_out", too_late)


def plant_off_by_one_block(llm: Any, patch: Callable[..., None]) -> None:
    copier = worker_connector()._worker._copier
    copy_out = copier.copy_out
    last = PRESSURE["num_blocks"] - 1
    patch(copier, "copy_out", lambda blocks, slots: copy_out([min(block + 1, last) for block in blocks], slots))


def plant_wrong_slot(llm: Any, patch: Callable[..., None]) -> None:
    copier = worker_connector()._worker._copier
    copy_in = copier.copy_in
    patch(copier, "copy_in", lambda slots, blocks, **how: copy_in([*slots[1:], slots[0]], blocks, **how))


def plant_lost_tail(llm: Any, patch: Callable[..., None]) -> None:
    copier = worker_connector()._worker._copier
    copy_out = copier.copy_out
    patch(copier, "copy_out", lambda blocks, slots: copy_out(blocks[:-1], slots[:-1]))


def plant_duplicated_token(llm: Any, patch: Callable[..., None]) -> None:
    scheduler = scheduler_of(llm)
    preempt = scheduler._preempt_request

    def repeating_preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        preempt(request, *args, **kwargs)
        if request.num_output_tokens and request.num_tokens < request.num_prompt_tokens + request.max_tokens - 2:
            request.append_output_token_ids(request.output_token_ids[-1])

    patch(scheduler, "_preempt_request", repeating_preempt)


def plant_leak_on_abort(llm: Any, patch: Callable[..., None]) -> None:
    patch(scheduler_of(llm)._swap.planning, "release", lambda request_id: None)


def plant_stale_map(llm: Any, patch: Callable[..., None]) -> None:
    pool = scheduler_of(llm)._swap.planning.pool
    get, seen = pool.get, {}

    def get_what_was_first(request_id: str) -> Any:
        saved = get(request_id)
        if saved is None:
            return None
        first = seen.setdefault(request_id, saved)
        slots = (*first.slots, *saved.slots[len(first.slots) :])[: len(saved.slots)]
        return replace(saved, slots=slots)

    patch(pool, "get", get_what_was_first)


def plant_swapped_layers(llm: Any, patch: Callable[..., None]) -> None:
    copier = worker_connector()._worker._copier
    copy_in = copier.copy_in

    def into_other_layers(slots: list[int], blocks: list[int], *, synchronous: bool) -> Any:
        copier._host_bytes.reverse()
        is_done = copy_in(slots, blocks, synchronous=synchronous)
        copier._host_bytes.reverse()
        return is_done

    patch(copier, "copy_in", into_other_layers)


def plant_ignored_salt(llm: Any, patch: Callable[..., None]) -> None:
    from vllm.v1.core import kv_cache_utils

    keys = kv_cache_utils.generate_block_hash_extra_keys

    def keys_without_salt(request: Any, *args: Any) -> Any:
        request.cache_salt = None
        return keys(request, *args)

    patch(kv_cache_utils, "generate_block_hash_extra_keys", keys_without_salt)


def plant_wrong_victim(llm: Any, patch: Callable[..., None]) -> None:
    preemptor = scheduler_of(llm).preemptor
    choose = preemptor.choose

    def choose_who_came_first(candidates: list[Candidate], pressure: Any) -> Any:
        return [
            replace(decision, request_id=candidates[index].request_id)
            for index, decision in enumerate(choose(candidates, pressure))
        ]

    patch(preemptor, "choose", choose_who_came_first)


BUGS = {
    name.removeprefix("plant_"): plant
    for name, plant in sorted(globals().items())
    if name.startswith("plant_") and callable(plant)
}
CHECKS = {"ignored_salt": lambda llm, base: check_salt(llm)}
SETTINGS = {"wrong_victim": {"preemption": "adaptive", "cost_snapshot": COSTS.to_json()}}
"""Settings of the connector with which a bug has something to spoil; every victim is swapped otherwise."""


def run(model: Path, base: Base, bug: str, patch: pytest.MonkeyPatch) -> None:
    """Start an engine, plant the bug, and check."""
    check = CHECKS.get(bug, check_engine)
    settings = {"guard": False, **SETTINGS.get(bug, {})}
    with engine(model, "swap", swap=settings, enable_prefix_caching=check is not check_engine, **PRESSURE) as llm:
        BUGS[bug](llm, patch.setattr)
        check(llm, base)


def test_there_are_ten() -> None:
    assert len(BUGS) == 10


@pytest.mark.parametrize("like", ["lost_tail", "ignored_salt", "wrong_victim"])
def test_without_a_bug_every_check_passes(
    tiny_model: Path, base: Base, like: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUGS, like, lambda llm, patch: None)
    run(tiny_model, base, like, monkeypatch)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(tiny_model: Path, base: Base, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        run(tiny_model, base, bug, monkeypatch)
