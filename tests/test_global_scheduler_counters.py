"""Goal: tenants and their users are counted apart and together, however they come, go, and wait at several replicas.

Method: the rules one by one as examples; random histories with every invariant checked. The levels' own rules are tested in
`test_global_scheduler_level.py`.
"""

import json
import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cost_service.charges import OTHER_USERS, Account
from global_scheduler.counters import FairCounters


def test_a_state_goes_through_json_and_back() -> None:
    counters = FairCounters()
    counters.set_present(Account("f", "u"), "r0", waiting=True, running=True)
    counters.charge(Account("f", "u"), 123.0)
    restored = FairCounters()
    restored.restore(json.loads(json.dumps(counters.state())))
    assert restored.tenants.counter("f") == 123.0
    assert restored.users("f").counter("u") == 123.0
    restored.tenants.set_present("g", "r0", waiting=True, running=False)
    assert restored.tenants.counter("g") == 123.0, "virtual time is part of the state"


@pytest.mark.parametrize("counter", [-1.0, math.nan, math.inf])
def test_a_state_with_an_impossible_counter_is_refused(counter: float) -> None:
    state = {"tenants": {"counters": {"f": counter}, "lifts": {}, "floor": 0.0}, "soles": {}, "users": {}}
    with pytest.raises(ValueError, match="stored counter of 'f'"):
        FairCounters().restore(state)


def test_further_users_share_one_account() -> None:
    counters = FairCounters(max_users=2)
    for number in range(20):
        counters.set_present(Account("f", f"u{number}"), "r0", waiting=True, running=False)
        counters.charge(Account("f", f"u{number}"), 10.0)
    users = counters.users("f")
    assert set(users) == {"u0", "u1", OTHER_USERS}
    assert users.counter(OTHER_USERS) == 10.0 + 180.0, "lifted to the first user, then charged for eighteen"
    assert counters.tenants.counter("f") == 200.0
    for number in range(2, 20):
        assert users.is_waiting(OTHER_USERS)
        counters.set_present(Account("f", f"u{number}"), "r0", waiting=False, running=False)
    assert not users.is_waiting(OTHER_USERS)
    counters.check()


def test_a_replicas_own_further_users_and_ours_wait_together_and_cease_to_one_by_one() -> None:
    """A replica that has met other users than we have says `other` itself, beside users whom only we let share."""
    counters = FairCounters(max_users=1)
    mine, theirs = Account("f", "u1"), Account("f", OTHER_USERS)
    counters.set_present(Account("f", "u0"), "r1", waiting=False, running=True)
    for account in (mine, theirs):
        counters.set_present(account, "r0", waiting=True, running=False)
    for account in (theirs, mine):
        assert counters.users("f").is_waiting(OTHER_USERS)
        counters.set_present(account, "r0", waiting=False, running=False)
    assert not counters.users("f").is_waiting(OTHER_USERS)
    counters.check()


@pytest.mark.parametrize("waiting", [True, False])
def test_a_second_user_begins_where_the_first_is_who_keeps_its_places(waiting: bool) -> None:
    counters = FairCounters()
    counters.set_present(Account("f", "u"), "r0", waiting=waiting, running=True)
    counters.charge(Account("f", "u"), 100.0)
    assert counters.several_users("f") is None
    counters.set_present(Account("f", "v"), "r1", waiting=True, running=False)
    users = counters.users("f")
    assert users is counters.several_users("f")
    assert (users.counter("u"), users.counter("v")) == (100.0, 100.0)
    assert users.places_of("u") == {"r0": waiting}
    counters.check()
    counters.remove_replica("r0")
    assert counters.tenants.places_of("f") == {"r1": True}
    counters.check()


def test_a_tenant_split_into_users_has_one_tenants_counter() -> None:
    counters = FairCounters()
    counters.charge(Account("g"), 100.0)
    for number in range(20):
        counters.charge(Account("f", f"u{number}"), 5.0)
    assert counters.tenants.counter("f") >= counters.tenants.counter("g")


class CountersMachine(RuleBasedStateMachine):
    """Everything that can happen to counters, in any order."""

    accounts = st.builds(Account, st.sampled_from("fgh"), st.sampled_from("abcd"))
    replicas = st.sampled_from(["r0", "r1", "r2"])

    def __init__(self) -> None:
        super().__init__()
        self.counters = FairCounters(max_users=2, credit=50.0)
        self.time = 0.0
        self.charged: dict[str, float] = {}

    @rule(account=accounts, replica=replicas, waiting=st.booleans(), running=st.booleans())
    def present(self, account: Account, replica: str, waiting: bool, running: bool) -> None:
        before = self.counters.tenants.counter(account.tenant)
        self.counters.set_present(account, replica, waiting=waiting, running=running)
        after = self.counters.tenants.counter(account.tenant)
        assert after >= before or account.tenant not in self.counters.tenants

    @rule(account=accounts, service=st.floats(0, 100), admitted=st.booleans())
    def charge(self, account: Account, service: float, admitted: bool) -> None:
        before = self.counters.tenants.counter(account.tenant)
        self.counters.charge(account, service, admitted=admitted)
        if account.tenant in self.counters.tenants:
            assert self.counters.tenants.counter(account.tenant) >= before + service - 1e-9

    @rule(account=accounts, service=st.floats(0, 100))
    def hold_and_refund(self, account: Account, service: float) -> None:
        if not self.counters.tenants.is_waiting(account.tenant):
            return
        before = self.counters.tenants.counter(account.tenant)
        self.counters.charge(account, service)
        self.counters.charge(account, -service)
        assert self.counters.tenants.counter(account.tenant) == pytest.approx(before)

    @rule(replica=replicas)
    def remove(self, replica: str) -> None:
        self.counters.remove_replica(replica)

    @precondition(lambda self: len(self.counters.tenants) > 0)
    @rule()
    def fold(self) -> None:
        self.counters.fold()

    @invariant()
    def all_holds(self) -> None:
        self.counters.check()

    @invariant()
    def virtual_time_does_not_fall(self) -> None:
        now = self.counters.tenants.virtual_time
        assert now >= self.time - 1e-6
        self.time = now


TestCounters = CountersMachine.TestCase
TestCounters.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
