"""Goal: what one replica measures serves every replica of its kind, and no other, across restarts and whatever arrives.

Method: samples drawn from known costs; a store in memory, and the real one.
"""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cluster.state import SqliteStore
from cost_service.service import KEY, CostService, Kind
from cost_service.snapshot import CostSnapshot
from tests.stores import MemoryStore, kept
from tests.test_cost_service_learner import START, TRUTH, samples

KIND = Kind.of(START)


def batch(num: int, *, seed: int = 0, truth: CostSnapshot = TRUTH) -> bytes:
    return msgspec.json.encode(list(samples(truth, num, seed=seed)))


def test_a_fresh_replica_gets_what_another_one_measured() -> None:
    service = CostService()
    assert service.snapshot(KIND) is None
    assert service.observe(START.to_json(), batch(400)) == 400
    assert service.refit() == [KIND]
    text = service.snapshot(KIND, since_version=START.version)
    assert text is not None
    learned = CostSnapshot.from_json(text)
    assert learned.version == START.version + 1
    assert learned.out_block_s == pytest.approx(TRUTH.out_block_s, rel=0.2)
    assert service.snapshot(KIND, since_version=learned.version) is None


def test_two_kinds_of_gpu_keep_their_costs_apart() -> None:
    service = CostService()
    other = replace(START, hardware="H100")
    fast = replace(TRUTH, recompute_fixed_s=4e-4, token_s=2e-5, out_block_s=2e-5, in_block_s=1e-5)
    service.observe(START.to_json(), batch(400))
    service.observe(other.to_json(), batch(400, truth=fast))
    assert service.refit() == sorted([KIND, Kind.of(other)])
    slow_text, fast_text = service.snapshot(KIND), service.snapshot(Kind.of(other))
    assert slow_text is not None
    assert fast_text is not None
    ratio = CostSnapshot.from_json(slow_text).out_block_s / CostSnapshot.from_json(fast_text).out_block_s
    assert ratio == pytest.approx(10.0, rel=0.3)
    for one in (replace(START, model="other"), replace(START, parallelism=2), replace(START, block_size=32)):
        assert service.snapshot(Kind.of(one)) is None


def test_the_newest_version_is_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    service, again = CostService(), CostService()
    keeper = kept(service, SqliteStore(path))
    service.observe(START.to_json(), batch(400))
    service.refit()
    keeper.keep(1.0)
    kept(again, SqliteStore(path))
    assert again.snapshot(KIND) == service.snapshot(KIND)
    again.observe(START.to_json(), batch(400, seed=1))
    again.refit()
    text = again.snapshot(KIND)
    assert text is not None
    assert CostSnapshot.from_json(text).version == START.version + 2


def test_damaged_costs_in_the_store_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    store, service = MemoryStore(), CostService()
    for name, document in {"a": json.loads(START.to_json()), "b": {"schema": 1}, "c": 3}.items():
        store.save(KEY, name, document)
    kept(service, store)
    assert [one["model"] for one in service.status()] == [START.model]
    assert caplog.text.count("are left out") == 2


@pytest.mark.parametrize(
    ("costs", "data"),
    [("", b"[]"), (START.to_json(), b""), (START.to_json(), b"{}"), (START.to_json(), b'[{"type":"copy"}]'),
     (START.to_json(), b'[{"type":"other"}]'), (START.to_json().replace("m", "n", 1), b"[]")],
)  # fmt: skip
def test_a_batch_that_is_none_is_counted_and_changes_nothing(costs: str, data: bytes) -> None:
    service = CostService()
    assert service.observe(costs, data) == 0
    assert service.num_rejected == 1
    assert service.refit() == []
    assert service.status() == []


def test_costs_that_are_read_late_are_taken_unless_newer_ones_were_learned() -> None:
    store, service = MemoryStore(), CostService()
    other = replace(START, hardware="H100", version=7)
    for name, snapshot in {"a": replace(START, version=START.version + 1, token_s=9.0), "b": other}.items():
        store.save(KEY, name, json.loads(snapshot.to_json()))
    for seed in range(2):
        service.observe(START.to_json(), batch(400, seed=seed))
        service.refit()
    learned = service.snapshot(KIND)
    kept(service, store)
    assert service.snapshot(KIND) == learned
    assert service.snapshot(Kind.of(other)) == other.to_json()


def test_costs_are_told_once_and_again_when_they_are_lost() -> None:
    service = CostService()
    service.observe(START.to_json(), batch(400))
    assert list(service.unsaved()) == [], "a replica's own, from which nothing was learned"
    service.refit()
    told = list(service.unsaved())
    assert [(collection, name) for collection, name, _ in told] == [(KEY, "/".join(map(str, KIND)))]
    assert list(service.unsaved()) == []
    service.forget_saved()
    assert list(service.unsaved()) == told


def test_predictions_are_for_people_and_say_whom_they_know() -> None:
    service = CostService()
    service.observe(START.to_json(), batch(800))
    service.refit()
    told = service.predict(KIND, num_tokens=500, num_blocks=20)
    assert told["prefill"] == pytest.approx(
        TRUTH.recompute_fixed_s + 500 * TRUTH.token_s + 500**2 * TRUTH.attention_s, rel=0.1
    )
    assert told["out"] == pytest.approx(TRUTH.swap_fixed_s + 20 * TRUTH.out_block_s, rel=0.1)
    with pytest.raises(ValueError, match="Nothing is known of"):
        service.predict(Kind("x", "y", 1, 16), num_tokens=1)
