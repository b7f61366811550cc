"""Goal: what a service knows is in the store whenever the store can be used, whatever happened to either; and nothing that
was stored is overwritten before it was read.

Method: a service of numbered counters and a store in memory that goes away, fills up, is emptied and damaged at random, held
to a model after every round.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cost_service.keeper import CHECK_INTERVAL_S, Keeper
from tests.stores import MemoryStore, kept

NAMES = st.sampled_from(["a", "b", "c"])


class Counters:
    """A service whose counters only rise; a stored one that is higher is taken."""

    collections = ("counters",)

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.saved: dict[str, int] = {}
        self.num_restored = 0

    def restore(self, documents: Mapping[str, Mapping[str, Any]]) -> None:
        self.num_restored += 1
        for name, count in documents["counters"].items():
            if count > self.counts.get(name, 0):
                self.counts[name] = self.saved[name] = count

    def unsaved(self) -> Iterator[tuple[str, str, Any]]:
        for name, count in self.counts.items():
            if self.saved.get(name) != count:
                self.saved[name] = count
                yield "counters", name, count

    def forget_saved(self) -> None:
        self.saved.clear()


class KeptThroughEverything(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store, self.now_s = MemoryStore(), 0.0
        self.start()

    @rule()
    def start(self) -> None:
        self.service = Counters()
        self.keeper = Keeper(self.store, self.service, nullcontext(), save_interval_s=2.0)
        self.is_kept = False

    @rule(name=NAMES, num=st.integers(1, 5))
    def count(self, name: str, num: int) -> None:
        self.service.counts[name] = self.service.counts.get(name, 0) + num
        self.is_kept = False

    @rule(away=st.booleans(), full=st.booleans())
    def go_away(self, away: bool, full: bool) -> None:
        self.store.problem = OSError("away") if away else None
        self.store.is_full = full
        self.is_kept = False

    @rule()
    def empty(self) -> None:
        self.store.texts.clear()
        self.is_kept = False

    @rule(name=NAMES)
    def lose(self, name: str) -> None:
        self.store.texts.pop(("counters", name), None)
        self.is_kept = False

    @rule(pass_s=st.floats(0.0, 5.0))
    def keep(self, pass_s: float) -> None:
        self.now_s += pass_s
        stored = dict(self.store.load("counters")) if self.store.problem is None else {}
        was_restored = self.keeper.is_restored
        try:
            self.keeper.keep(self.now_s)
        except OSError:
            return
        if not was_restored:
            assert self.service.num_restored == 1
            for name, count in stored.items():
                assert self.service.counts[name] >= count, "what was stored is lost"

    @rule()
    def wait_long(self) -> None:
        """After a look and a time to save, all is there, unless the store cannot be used."""
        self.keep(0.0)
        self.keep(CHECK_INTERVAL_S)
        self.keep(2.0)
        self.is_kept = self.store.problem is None and not self.store.is_full

    @invariant()
    def what_is_kept_is_there(self) -> None:
        if self.is_kept:
            assert self.store.load("counters") == self.service.counts


KeptThroughEverything.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestKeptThroughEverything = KeptThroughEverything.TestCase


def test_news_are_written_at_their_interval_and_what_is_lost_at_once() -> None:
    store, service = MemoryStore(), Counters()
    keeper = Keeper(store, service, nullcontext(), save_interval_s=10.0)
    keeper.keep(0.0)
    service.counts["a"] = 1
    keeper.keep(9.0)
    assert store.texts == {}
    keeper.keep(10.0)
    assert store.load("counters") == {"a": 1}
    store.texts.clear()
    keeper.keep(10.0 + CHECK_INTERVAL_S)
    assert store.load("counters") == {"a": 1}
    assert store.num_saved == 2


def test_after_an_outage_the_first_round_looks_and_writes_all_that_is_lost() -> None:
    store, service = MemoryStore(), Counters()
    service.counts = {"a": 1, "b": 2}
    keeper = kept(service, store)
    store.problem = OSError("away")
    with pytest.raises(OSError, match="away"):
        keeper.keep(4.0)
    store.problem = None
    store.texts.clear()
    keeper.keep(4.1)
    assert store.load("counters") == {"a": 1, "b": 2}


def test_what_a_service_no_longer_has_is_not_missed_for_ever() -> None:
    store, service = MemoryStore(), Counters()
    service.counts = {"a": 1, "b": 2}
    keeper = kept(service, store)
    del service.counts["b"]
    store.texts.clear()
    for round_number in range(1, 5):
        keeper.keep(10.0 * round_number)
    assert store.load("counters") == {"a": 1}
    assert store.num_saved == 3
