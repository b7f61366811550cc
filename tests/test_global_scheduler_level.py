"""Goal: one level of counters follows VTC's rules, however names come, go, wait at several replicas and are refunded.

Method: the rules one by one as examples; random histories against a plain VTC for one replica.
"""

from hypothesis import given
from hypothesis import strategies as st

from global_scheduler.level import Level


def waits(level: Level, name: str, *replicas: str) -> None:
    for replica in replicas or ("r0",):
        level.set_present(name, replica, waiting=True, running=False)


def runs(level: Level, name: str, replica: str = "r0") -> None:
    level.set_present(name, replica, waiting=False, running=True)


def leaves(level: Level, name: str, *replicas: str) -> None:
    for replica in replicas or ("r0",):
        level.set_present(name, replica, waiting=False, running=False)


def test_a_tenant_that_returns_is_lifted_to_the_least_served_who_waits() -> None:
    level = Level()
    waits(level, "f")
    waits(level, "g")
    level.charge("f", 500.0)
    level.charge("g", 300.0)
    waits(level, "h")
    assert level.counter("h") == 300.0


def test_a_tenant_that_returns_to_an_empty_queue_is_lifted_to_the_last_that_left() -> None:
    level = Level()
    waits(level, "f")
    level.charge("f", 500.0)
    runs(level, "f")
    level.charge("f", 100.0)
    waits(level, "h")
    assert level.counter("h") == 600.0


def test_a_lift_never_lowers_a_counter() -> None:
    level = Level()
    waits(level, "f")
    waits(level, "g")
    level.charge("f", 900.0)
    level.charge("g", 10.0)
    leaves(level, "f")
    waits(level, "f")
    assert level.counter("f") == 900.0


def test_service_counts_by_weight() -> None:
    level = Level()
    level.set_weight("f", 3.0)
    waits(level, "f")
    level.charge("f", 300.0)
    assert level.counter("f") == 100.0


def test_a_newcomer_is_not_lifted_to_one_whom_a_busy_replica_holds_back() -> None:
    level = Level()
    waits(level, "f", "r0", "r1")
    waits(level, "pinned", "r0")
    level.charge("f", 10_000.0)
    level.charge("pinned", 1_000.0)
    waits(level, "h", "r1")
    assert level.counter("h") == 10_000.0, "h would have replica r1 to itself"


def test_who_was_held_back_elsewhere_claims_at_most_the_credit_at_another_replica() -> None:
    level = Level(credit=500.0)
    waits(level, "f", "r0", "r1")
    waits(level, "pinned", "r0")
    level.charge("f", 10_000.0)
    waits(level, "pinned", "r1")
    assert level.counter("pinned") == 9_500.0


def test_within_the_credit_a_tenant_that_spreads_keeps_its_counter() -> None:
    level = Level(credit=500.0)
    waits(level, "f", "r0", "r1")
    waits(level, "g", "r0")
    level.charge("f", 400.0)
    waits(level, "g", "r1")
    assert level.counter("g") == 0.0


def test_service_of_a_tenant_never_seen_waiting_is_charged_from_the_least_counter_on() -> None:
    level = Level()
    waits(level, "f")
    level.charge("f", 700.0)
    level.charge("g", 50.0)
    assert level.counter("g") == 750.0


def test_counters_stay_together_while_nobody_waits_so_that_unused_time_is_not_saved_up() -> None:
    level = Level()
    for name in "fg":
        runs(level, name)
    for _ in range(100):
        level.charge("f", 90.0, admitted=True)
        level.charge("g", 10.0, admitted=True)
    assert level.counter("f") - level.counter("g") <= 90.0
    assert level.virtual_time == level.counter("g"), "the last who was admitted"
    waits(level, "g")
    waits(level, "f")
    assert abs(level.counter("f") - level.counter("g")) <= 90.0


def test_who_runs_and_is_admitted_at_once_is_lifted_to_those_who_wait_and_decoding_alone_lifts_nobody() -> None:
    level = Level()
    runs(level, "g")
    waits(level, "f")
    level.charge("f", 1000.0)
    level.charge("g", 10.0)
    assert level.counter("g") == 10.0
    level.charge("g", 10.0, admitted=True)
    assert level.counter("g") == 1010.0


def test_who_waits_and_is_admitted_keeps_its_claim() -> None:
    level = Level()
    waits(level, "f")
    waits(level, "g")
    level.charge("f", 1000.0, admitted=True)
    level.charge("g", 10.0, admitted=True)
    assert level.counter("g") == 10.0


def test_who_left_without_debt_is_forgotten_and_who_has_debt_is_kept_until_the_others_caught_up() -> None:
    level = Level()
    for name in "fgh":
        waits(level, name)
    level.charge("f", 100.0)
    level.charge("g", 900.0)
    level.charge("h", 200.0)
    leaves(level, "f")
    leaves(level, "g")
    assert set(level) == {"g", "h"}
    level.charge("h", 600.0)
    assert level.fold() == []
    level.charge("h", 100.0)
    assert level.fold() == ["g"]
    waits(level, "g")
    assert level.counter("g") == 900.0, "what folding forgot is what a lift gives back"


def test_a_refund_never_takes_more_than_was_charged_since_the_lift() -> None:
    level = Level()
    waits(level, "f")
    level.charge("f", 800.0)
    waits(level, "g")
    level.charge("g", 50.0)
    level.charge("g", -500.0)
    assert level.counter("g") == 800.0


def test_a_replica_that_is_gone_holds_nobody() -> None:
    level = Level()
    waits(level, "f", "r0", "r1")
    waits(level, "g", "r0")
    level.remove_replica("r0")
    assert level.is_waiting("f")
    assert not level.is_waiting("g")
    level.check()


class PlainVtc:
    """VTC's algorithm 2 as it stands in the paper, one replica."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self.queue: set[str] = set()
        self.last: str | None = None

    def arrives(self, name: str) -> None:
        floor = min((self.counters[other] for other in self.queue), default=None)
        if floor is None:
            floor = 0.0 if self.last is None else self.counters[self.last]
        self.counters[name] = max(self.counters.get(name, 0.0), floor)
        self.queue.add(name)

    def leaves(self, name: str) -> None:
        self.queue.discard(name)
        self.last = name


@given(st.lists(st.tuples(st.sampled_from("fghi"), st.sampled_from(["arrive", "leave", "charge"]), st.integers(1, 99))))
def test_with_one_replica_it_is_vtc(history: list[tuple[str, str, int]]) -> None:
    level, vtc = Level(), PlainVtc()
    for name, what, amount in history:
        if what == "arrive" and name not in vtc.queue:
            waits(level, name)
            vtc.arrives(name)
        elif what == "leave" and name in vtc.queue:
            runs(level, name)
            vtc.leaves(name)
        elif what == "charge" and name in vtc.counters:
            level.charge(name, float(amount))
            vtc.counters[name] += amount
        assert all(level.counter(name) == counter for name, counter in vtc.counters.items())
        level.check()
