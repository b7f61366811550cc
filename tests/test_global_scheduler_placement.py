"""Goal: requests are spread as `global_scheduler.placement` promises, on old news too, and cached beginnings are used.

Method: example tests for each rule and for what happens when replicas say nothing; random histories of arrivals, reports,
ends and crashes hold the bound on a tenant's backlog, all counts (`check`), and that the same history decides the same.
"""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cost_service.service_messages import ReplicaLoad
from global_scheduler.placement import CACHED_WORTH, Decision, Placement, PlacementSettings
from global_scheduler.prefix_homes import Mark

EXCHANGE = PlacementSettings().exchange_tokens


def load(
    free_tokens: int = 100_000, *, working: bool = False, backlog: dict[str, int] | None = None, waiting: int | None = None
) -> ReplicaLoad:  # fmt: skip
    backlog = backlog or {}
    num_waiting_tokens = sum(backlog.values()) if waiting is None else waiting
    return ReplicaLoad(
        epoch="e", sequence=1, num_running=int(working), num_waiting=int(bool(num_waiting_tokens)), num_blocks=200_000,
        num_free_blocks=free_tokens, block_size=1, num_waiting_tokens=num_waiting_tokens, backlog=backlog,
    )  # fmt: skip


def placement(num_replicas: int, *, told: bool = True, **changes: float) -> Placement:
    """Replicas `a`, `b` and so on, which have all said that they are free, or nothing."""
    made = Placement(PlacementSettings(**changes))
    for name in names(num_replicas):
        made.up(name)
        if told:
            made.report(name, load(), as_of_s=0.0, now_s=0.0)
    return made


def names(num: int) -> list[str]:
    return [chr(ord("a") + number) for number in range(num)]


class Asking:
    """Places requests one after another."""

    def __init__(self, placement: Placement, now_s: float = 1.0) -> None:
        self.placement, self.now_s, self.num = placement, now_s, 0

    def __call__(self, tenant: str = "t", num_tokens: int = 100, prefix: int | None = None) -> Decision:
        self.num += 1
        marks = [] if prefix is None else [Mark(prefix, num_tokens)]
        return self.placement.place(
            str(self.num), tenant=tenant, num_tokens=num_tokens, marks=marks, now_s=self.now_s
        )  # fmt: skip


def test_equal_replicas_get_requests_in_the_order_of_their_ids() -> None:
    ask = Asking(placement(3))
    assert [ask().replica for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_on_news_of_a_second_ago_a_hundred_requests_do_not_herd() -> None:
    made = placement(4)
    ask = Asking(made)
    chosen = [ask().replica for _ in range(100)]
    assert {name: chosen.count(name) for name in names(4)} == dict.fromkeys(names(4), 25)
    made.check()


def test_the_replica_with_most_room_is_taken_and_those_who_wait_there_count() -> None:
    made = placement(3)
    made.report("a", load(50_000), as_of_s=0.0, now_s=0.0)
    made.report("b", load(60_000), as_of_s=0.0, now_s=0.0)
    made.report("c", load(90_000, waiting=35_000), as_of_s=0.0, now_s=0.0)
    decision = Asking(made)()
    assert (decision.replica, decision.free_tokens) == ("b", 60_000)


def test_a_tenants_backlog_is_evened_out_although_there_is_more_room_where_it_waits() -> None:
    made = placement(2)
    made.report("a", load(100_000, backlog={"t": EXCHANGE + 1}), as_of_s=0.0, now_s=0.0)
    made.report("b", load(10_000), as_of_s=0.0, now_s=0.0)
    ask = Asking(made)
    decision = ask("t")
    assert (decision.replica, decision.backlog_tokens, decision.num_candidates) == ("b", 0, 1)
    assert ask("other").replica == "a", "its backlog is its own alone"


def test_what_was_sent_counts_until_a_report_of_a_later_time_and_no_longer() -> None:
    made = placement(2)
    ask = Asking(made)
    assert ask(num_tokens=1000).replica == "a"
    made.report("a", load(), as_of_s=0.9, now_s=1.1)
    assert ask(num_tokens=500).replica == "b", "a report of an earlier time does not tell of it"
    made.report("a", load(), as_of_s=1.1, now_s=1.2)
    assert ask().replica == "a", "a report of a later time would tell of it if it were still there"
    made.check()


def test_a_request_that_is_over_counts_no_more_and_may_be_named_again() -> None:
    made = placement(2)
    ask = Asking(made)
    assert ask().replica == "a"
    made.ended("1")
    made.ended("1")
    made.ended("unknown")
    assert ask().replica == "a"
    made.check()


def test_who_asks_again_at_once_finds_its_beginning_although_the_report_is_of_before() -> None:
    made = placement(2)
    ask = Asking(made)
    assert ask(num_tokens=2000, prefix=1).replica == "a"
    made.report("a", load(97_000, working=True), as_of_s=1.1, now_s=1.2)
    made.ended("1")
    assert ask(num_tokens=2000, prefix=1).replica == "a", "what it held itself is no reason to go elsewhere"


def test_a_request_that_went_elsewhere_counts_there() -> None:
    made = placement(2)
    ask = Asking(made)
    assert ask().replica == "a"
    made.moved("1", "b")
    made.moved("unknown", "b")
    assert ask().replica == "a"
    made.check()


def test_requests_with_the_same_beginning_stay_together_one_after_another() -> None:
    made = placement(3)
    ask = Asking(made)
    first = ask(num_tokens=2000, prefix=1)
    assert [ask(num_tokens=2000, prefix=2).replica, ask(num_tokens=2000, prefix=3).replica] == ["b", "c"]
    for number in range(1, 4):
        made.ended(str(number))
    for _ in range(4):
        again = ask(num_tokens=2000, prefix=1)
        assert (again.replica, again.cached_tokens) == (first.replica, 2000)
        assert ask(num_tokens=2000, prefix=3).replica == "c"


@given(num_tokens=st.integers(1, 100_000), imbalance=st.integers(0, 200_000))
def test_a_cached_beginning_is_worth_room_and_never_more_than_the_constant(num_tokens: int, imbalance: int) -> None:
    made = placement(2)
    ask = Asking(made)
    assert ask(num_tokens=num_tokens, prefix=1).replica == "a"
    made.ended("1")
    made.report("a", load(200_000 - imbalance), as_of_s=2.0, now_s=2.0)
    made.report("b", load(200_000), as_of_s=2.0, now_s=2.0)
    kept = ask(num_tokens=num_tokens, prefix=1).replica == "a"
    assert kept == (imbalance <= min(CACHED_WORTH * num_tokens, EXCHANGE))


def test_a_beginning_is_forgotten_with_the_replica_that_had_it() -> None:
    made = placement(2)
    ask = Asking(made)
    assert ask(num_tokens=50).replica == "a"
    assert ask(num_tokens=2000, prefix=1).replica == "b"
    made.down("b")
    made.up("b")
    assert ask(num_tokens=2000, prefix=1).cached_tokens == 0
    made.check()


def test_a_replica_that_has_said_nothing_is_taken_for_an_average_one() -> None:
    made = placement(3)
    made.report("a", load(10_000), as_of_s=0.0, now_s=0.0)
    made.report("b", load(30_000), as_of_s=0.0, now_s=0.0)
    made.down("c")
    made.up("c")
    ask = Asking(made)
    chosen = [ask(tenant, num_tokens=5000) for tenant in "wxyz"]
    assert [each.replica for each in chosen] == ["b", "b", "b", "c"]
    assert chosen[0].num_silent == 1
    assert chosen[3].free_tokens == 20_000


def test_where_nobody_has_said_anything_requests_go_where_fewest_tokens_are_in_work() -> None:
    ask = Asking(placement(2, told=False))
    assert [ask(num_tokens=each).replica for each in (300, 100, 100, 200)] == ["a", "b", "b", "b"]


@pytest.mark.parametrize(("working", "sent", "silent"), [(False, False, 0), (True, False, 1), (False, True, 1)])
def test_silence_is_late_news_only_where_there_is_work_to_tell_of(working: bool, sent: bool, silent: int) -> None:
    made = placement(2, max_age_s=5.0)
    made.report("a", load(60_000, working=working), as_of_s=0.0, now_s=0.0)
    made.report("b", load(50_000), as_of_s=0.0, now_s=0.0)
    if sent:
        assert Asking(made)(num_tokens=1).replica == "a"
    ask = Asking(made, now_s=5.1)
    ask.num = 10
    decision = ask(num_tokens=1)
    assert decision.num_silent == silent
    assert decision.replica == ("b" if sent else "a")
    assert decision.free_tokens == (50_000 if silent else 60_000), "an average replica is like b, for there is no other"


@pytest.mark.parametrize("name", ["exchange_tokens", "max_age_s"])
@pytest.mark.parametrize("value", [-1, math.inf, math.nan])
def test_a_bad_setting_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        PlacementSettings(**{name: value})


@settings(deadline=None)
@given(
    num_replicas=st.integers(1, 6),
    asked=st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 20_000), st.integers(0, 3)), max_size=60),
)
def test_no_tenants_backlogs_are_further_apart_than_the_constant_and_one_request(
    num_replicas: int, asked: list[tuple[str, int, int]]
) -> None:
    made, again = placement(num_replicas), placement(num_replicas)
    ask, repeat = Asking(made), Asking(again)
    backlogs: dict[str, dict[str, int]] = {}
    for number, (tenant, num_tokens, prefix) in enumerate(asked):
        decision = ask(tenant, num_tokens, prefix or None)
        assert decision == repeat(tenant, num_tokens, prefix or None)
        of_tenant = backlogs.setdefault(tenant, dict.fromkeys(names(num_replicas), 0))
        of_tenant[decision.replica] += max(1, num_tokens - decision.cached_tokens)
        largest = max(size for who, size, _ in asked[: number + 1] if who == tenant)
        assert max(of_tenant.values()) - min(of_tenant.values()) <= EXCHANGE + largest
    made.check()


class History(RuleBasedStateMachine):
    """What may happen to a router, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.placement = Placement()
        self.now_s, self.num = 0.0, 0
        self.up: set[str] = set()

    @rule(seconds=st.floats(0.0, 4.0))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(name=st.sampled_from("abcde"))
    def a_replica_comes_or_goes(self, name: str) -> None:
        (self.placement.down if name in self.up else self.placement.up)(name)
        self.up ^= {name}

    @precondition(lambda self: self.up)
    @rule(
        free=st.integers(0, 5000), working=st.booleans(), age_s=st.floats(0.0, 3.0), number=st.integers(0, 4),
        backlog=st.dictionaries(st.sampled_from("xyz"), st.integers(0, 30_000), max_size=3),
    )  # fmt: skip
    def a_replica_reports(
        self, free: int, working: bool, age_s: float, number: int, backlog: dict[str, int]
    ) -> None:  # fmt: skip
        name = sorted(self.up)[number % len(self.up)]
        said = load(free, working=working, backlog=backlog)
        self.placement.report(name, said, as_of_s=self.now_s - age_s, now_s=self.now_s)

    @precondition(lambda self: self.up)
    @rule(tenant=st.sampled_from("xyz"), num_tokens=st.integers(1, 9000), prefix=st.integers(0, 4))
    def a_request_comes(self, tenant: str, num_tokens: int, prefix: int) -> None:
        self.num += 1
        decision = self.placement.place(
            str(self.num), tenant=tenant, num_tokens=num_tokens, marks=[Mark(prefix, 256)], now_s=self.now_s
        )  # fmt: skip
        assert decision.replica in self.up
        assert decision.backlog_tokens <= decision.least_backlog_tokens + EXCHANGE
        assert 1 <= decision.num_candidates <= len(self.up)
        assert decision.cached_tokens <= num_tokens

    @precondition(lambda self: self.num)
    @rule(number=st.integers(0, 1000))
    def a_request_ends(self, number: int) -> None:
        self.placement.ended(str(1 + number % self.num))

    @precondition(lambda self: self.num and self.up)
    @rule(number=st.integers(0, 1000))
    def a_request_went_elsewhere(self, number: int) -> None:
        self.placement.moved(str(1 + number % self.num), sorted(self.up)[number % len(self.up)])

    @invariant()
    def all_is_counted(self) -> None:
        self.placement.check()


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
