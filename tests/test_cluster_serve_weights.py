"""Goal: the fairness scheduler learns every weight that changes, and all of them in another life; nothing is told twice.

Method: the real service behind the actor's method; no Ray.
"""

import asyncio
from collections.abc import Mapping

import pytest

from cluster import serve_weights
from cluster.serve_weights import WeightTeller
from global_scheduler.fairness_service import FairnessService
from tests.stores import MemoryStore, kept


class Actor:
    """What Ray's handle is to the teller: a method with `remote`."""

    def __init__(self, store: MemoryStore, life: str) -> None:
        self.service = FairnessService(life=life, now_s=0.0)
        self.keeper = kept(self.service, store)
        self.set_weights = self
        self.told: list[dict[str, float]] = []

    async def remote(self, weights: Mapping[str, float]) -> str:
        self.told.append(dict(weights))
        return self.service.set_weights(weights)


def tell(teller: WeightTeller, actor: Actor) -> dict[str, float]:
    asyncio.run(teller._tell(actor))
    return actor.told[-1]


def test_each_change_is_told_once() -> None:
    weights = {"f": 1.0, "g": 2.0}
    teller, actor = WeightTeller(lambda: weights), Actor(MemoryStore(), "one")
    assert tell(teller, actor) == {"f": 1.0, "g": 2.0}
    assert tell(teller, actor) == {}
    weights["g"] = 1.0
    assert tell(teller, actor) == {"g": 1.0}


def test_another_life_is_told_all_also_who_has_fallen_back_to_1() -> None:
    store, weights = MemoryStore(), {"f": 1.0, "g": 2.0}
    teller, actor = WeightTeller(lambda: weights), Actor(store, "one")
    tell(teller, actor)
    for document in actor.service.unsaved():
        store.save(*document)
    weights["g"] = 1.0
    again = Actor(store, "two")
    assert tell(teller, again) == {"g": 1.0}, "it is known to be another one by its answer"
    assert tell(teller, again) == {"f": 1.0}
    assert tell(teller, again) == {}


def test_many_are_told_in_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_weights, "MAX_AT_ONCE", 2)
    weights = dict.fromkeys("abcde", 3.0)
    teller, actor = WeightTeller(lambda: weights), Actor(MemoryStore(), "one")
    told = [tell(teller, actor) for _ in range(4)]
    assert [len(each) for each in told] == [2, 2, 1, 0]
