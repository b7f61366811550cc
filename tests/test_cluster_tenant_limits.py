"""Goal: one ingress never has more of a tenant in work than its share of the caps, or one request within the whole cap;
what is within a cap is never refused for ever, and who is refused learns a useful time.

Method: a state machine over admissions, first outputs and endings of several tenants with caps that change, against counts
kept beside it; a simulated queue of one tenant for the time that is told.
"""

import heapq
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.tenant_limits import (
    MAX_RETRY_AFTER_S,
    MIN_RETRY_AFTER_S,
    Admissions,
    Phase,
    Refusal,
    TenantLimits,
    Ticket,
)

TENANTS = ("a", "b")
NO_LIMITS = TenantLimits()
CAPS = st.one_of(st.none(), st.integers(1, 12))


def admitted(admissions: Admissions, limits: TenantLimits, now_s: float = 0.0, tokens: int = 1) -> Ticket:
    ticket = admissions.admit("a", limits, num_requests=1, prompt_tokens=tokens, now_s=now_s)
    assert isinstance(ticket, Ticket), ticket
    return ticket


def refused(admissions: Admissions, limits: TenantLimits, now_s: float = 0.0, tokens: int = 1, num: int = 1) -> Refusal:
    refusal = admissions.admit("a", limits, num_requests=num, prompt_tokens=tokens, now_s=now_s)
    assert isinstance(refusal, Refusal), refusal
    return refusal


class Ingress(RuleBasedStateMachine):
    """Two tenants at one of three ingresses."""

    NUM_INGRESSES = 3

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.admissions = Admissions(num_ingresses=self.NUM_INGRESSES)
        self.limits = dict.fromkeys(TENANTS, NO_LIMITS)
        self.tickets: list[Ticket] = []

    def counts(self, tenant: str) -> tuple[int, int, int]:
        mine = [ticket for ticket in self.tickets if ticket.tenant == tenant and ticket.phase is not Phase.ENDED]
        queued = [ticket for ticket in mine if ticket.phase is Phase.QUEUED]
        return (
            sum(ticket.num_requests for ticket in mine),
            sum(ticket.num_requests for ticket in queued),
            sum(ticket.prompt_tokens for ticket in queued),
        )

    @rule(tenant=st.sampled_from(TENANTS), concurrent=CAPS, queued=CAPS, tokens=CAPS)
    def set_limits(self, tenant: str, concurrent: int | None, queued: int | None, tokens: int | None) -> None:
        self.limits[tenant] = TenantLimits(
            max_concurrent_requests=concurrent, max_queued_requests=queued, max_queued_tokens=tokens
        )

    @rule(seconds=st.one_of(st.floats(0, 100), st.sampled_from([-1e9, -5.0, 1e9])))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(tenant=st.sampled_from(TENANTS), num=st.integers(1, 6), tokens=st.integers(0, 8))
    def admit(self, tenant: str, num: int, tokens: int) -> None:
        limits = self.limits[tenant]
        asked = dict(
            zip(
                ("max_concurrent_requests", "max_queued_requests", "max_queued_tokens"),
                zip(self.counts(tenant), (num, num, tokens), strict=True),
                strict=True,
            )
        )
        outcome = self.admissions.admit(tenant, limits, num_requests=num, prompt_tokens=tokens, now_s=self.now_s)
        caps = {name: getattr(limits, name) for name in asked}
        shares = {name: math.ceil(cap / self.NUM_INGRESSES) for name, cap in caps.items() if cap is not None}
        over = {
            name
            for name, share in shares.items()
            if sum(asked[name]) > (share if asked[name][0] else caps[name])  # alone, the whole cap
        }
        if isinstance(outcome, Ticket):
            assert not over, "admitted over a cap"
            self.tickets.append(outcome)
            return
        assert outcome.cap in over
        never_fits = any(asked[name][1] > caps[name] for name in shares)
        assert outcome.limit == (caps if never_fits else shares)[outcome.cap]
        if never_fits:
            assert outcome.retry_after_s is None
        else:
            assert outcome.retry_after_s is not None
            assert MIN_RETRY_AFTER_S <= outcome.retry_after_s <= MAX_RETRY_AFTER_S

    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        if self.tickets:
            self.admissions.start(data.draw(st.sampled_from(self.tickets)), self.now_s)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.tickets:
            self.admissions.end(data.draw(st.sampled_from(self.tickets)), self.now_s)

    @invariant()
    def counts_are_those_of_the_tickets(self) -> None:
        self.admissions.check()
        for tenant in TENANTS:
            load = self.admissions.load(tenant)
            assert (load.concurrent_requests, load.queued_requests, load.queued_tokens) == self.counts(tenant)

    def teardown(self) -> None:
        for ticket in self.tickets:
            self.admissions.end(ticket, self.now_s)
        for tenant in TENANTS:
            load = self.admissions.load(tenant)
            assert (load.concurrent_requests, load.queued_requests, load.queued_tokens) == (0, 0, 0)


TestIngress = Ingress.TestCase
TestIngress.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# Caps


def test_over_each_cap_a_request_is_refused_and_told_which() -> None:
    for limits in (
        TenantLimits(max_concurrent_requests=2),
        TenantLimits(max_queued_requests=2),
        TenantLimits(max_queued_tokens=20),
    ):
        admissions = Admissions(num_ingresses=1)
        for _ in range(2):
            admitted(admissions, limits, tokens=10)
        refusal = refused(admissions, limits, tokens=10)
        assert getattr(limits, refusal.cap) == refusal.limit


def test_a_first_output_frees_the_queue_and_the_end_everything() -> None:
    admissions = Admissions(num_ingresses=1)
    limits = TenantLimits(max_concurrent_requests=2, max_queued_requests=1)
    first = admitted(admissions, limits)
    assert refused(admissions, limits).cap == "max_queued_requests"
    admissions.start(first, 1.0)
    second = admitted(admissions, limits, 1.0)
    admissions.start(second, 2.0)
    assert refused(admissions, limits, 2.0).cap == "max_concurrent_requests"
    admissions.end(first, 3.0)
    admitted(admissions, limits, 3.0)


def test_a_tenants_caps_are_no_other_tenants() -> None:
    admissions = Admissions(num_ingresses=1)
    limits = TenantLimits(max_concurrent_requests=1)
    admitted(admissions, limits)
    refused(admissions, limits)
    assert isinstance(admissions.admit("b", limits, num_requests=1, prompt_tokens=1, now_s=0.0), Ticket)


def test_prompts_and_choices_count_each() -> None:
    admissions = Admissions(num_ingresses=1)
    assert refused(admissions, TenantLimits(max_concurrent_requests=4), num=5).retry_after_s is None
    limits = TenantLimits(max_concurrent_requests=4)
    assert isinstance(admissions.admit("a", limits, num_requests=3, prompt_tokens=1, now_s=0.0), Ticket)
    assert refused(admissions, limits, num=2).retry_after_s is not None


def test_a_request_within_its_cap_but_over_a_share_is_admitted_where_its_tenant_has_nothing_and_else_told_when() -> (
    None
):
    admissions, limits = Admissions(num_ingresses=4), TenantLimits(max_queued_tokens=10_000)
    large = admitted(admissions, limits, tokens=3_000)
    assert refused(admissions, limits, tokens=3_000).retry_after_s is not None, "not for ever"
    assert refused(admissions, limits, tokens=1).retry_after_s is not None, "the share is more than taken"
    admissions.start(large, 1.0)
    small = admitted(admissions, limits, 1.0, tokens=1)
    waits = refused(admissions, limits, 1.0, tokens=10_000)
    assert (waits.limit, waits.retry_after_s is None) == (2_500, False)
    admissions.start(small, 2.0)
    admitted(admissions, limits, 2.0, tokens=10_000)


@pytest.mark.parametrize("num_ingresses", [1, 2, 4])
def test_only_what_is_larger_than_the_whole_cap_is_refused_for_ever(num_ingresses: int) -> None:
    admissions = Admissions(num_ingresses=num_ingresses)
    refusal = refused(admissions, TenantLimits(max_queued_tokens=10_000), tokens=10_001)
    assert (refusal.limit, refusal.retry_after_s) == (10_000, None)
    assert refused(admissions, TenantLimits(max_concurrent_requests=3), num=4).retry_after_s is None


@given(
    cap=st.integers(1, 40),
    num_ingresses=st.integers(1, 5),
    asked=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 45), st.booleans()), max_size=60),
)
def test_ingresses_together_stay_within_the_bound_that_is_stated(
    cap: int, num_ingresses: int, asked: list[tuple[int, int, bool]]
) -> None:
    """Requests at any ingress, some of which start at once; the most that was queued at one time, and by whom."""
    ingresses = [Admissions(num_ingresses=num_ingresses) for _ in range(num_ingresses)]
    limits, share, are_small = TenantLimits(max_queued_tokens=cap), -(-cap // num_ingresses), True
    for number, tokens, starts in asked:
        ingress = ingresses[number % num_ingresses]
        outcome = ingress.admit("a", limits, num_requests=1, prompt_tokens=tokens, now_s=0.0)
        if isinstance(outcome, Ticket):
            are_small = are_small and tokens <= share
        load = ingress.load("a")
        assert load.queued_tokens <= share or (load.queued_requests == 1 and load.queued_tokens <= cap)
        together = sum(each.load("a").queued_tokens for each in ingresses)
        assert together <= (cap + num_ingresses - 1 if are_small else cap * num_ingresses)
        if isinstance(outcome, Ticket) and starts:
            ingress.start(outcome, 0.0)


@given(cap=st.integers(1, 1000), num_ingresses=st.integers(1, 64))
def test_shares_together_are_more_than_the_cap_by_less_than_one_each(cap: int, num_ingresses: int) -> None:
    share = TenantLimits(max_concurrent_requests=cap).share(num_ingresses).max_concurrent_requests
    assert share is not None
    assert cap <= share * num_ingresses <= cap + num_ingresses - 1


@pytest.mark.parametrize("value", [0, -1, 2**53 + 1, 1.5, True, "3", math.nan])
def test_a_cap_that_is_no_positive_whole_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(
        ValueError, match=r"^max_queued_tokens must be a whole number from 1 to 2\^53, or none for no cap\.$"
    ):
        TenantLimits(max_queued_tokens=value)  # type: ignore[arg-type]


# When to come again


def test_who_is_refused_is_told_how_fast_the_tenants_own_requests_end() -> None:
    limits = TenantLimits(max_concurrent_requests=4)
    told = {}
    for service_s in (1.0, 8.0):  # of each of four at once
        admissions, now_s = Admissions(num_ingresses=1), 0.0
        for _ in range(50):
            tickets = [admitted(admissions, limits, now_s) for _ in range(4)]
            now_s += service_s
            for ticket in tickets:
                admissions.end(ticket, now_s)
        for _ in range(4):
            admitted(admissions, limits, now_s)
        told[service_s] = [refused(admissions, limits, now_s).retry_after_s for _ in range(8)]
    assert told[8.0] == pytest.approx([2.0 * turn for turn in range(1, 9)], rel=0.15)
    assert told[1.0][:3] == [MIN_RETRY_AFTER_S] * 3
    assert told[1.0][-1] == pytest.approx(2.0, rel=0.15)


def test_a_tenant_that_was_idle_is_not_taken_for_slow() -> None:
    admissions, limits = Admissions(num_ingresses=1), TenantLimits(max_concurrent_requests=1)
    for number in range(100):
        ticket = admitted(admissions, limits, float(number))
        admissions.end(ticket, number + 0.5)
    before = admissions.load("a").drain_rate
    assert before == pytest.approx(2.0, rel=0.05)
    admitted(admissions, limits, 1e6)
    assert admissions.load("a").drain_rate == before


def test_a_tenant_whose_requests_do_not_end_is_told_to_wait_longer_and_longer() -> None:
    limits = TenantLimits(max_concurrent_requests=1)
    told = []
    for age_s in (0.0, 5.0, 20.0, 1000.0):
        admissions = Admissions(num_ingresses=1)
        admitted(admissions, limits)
        told.append(refused(admissions, limits, age_s).retry_after_s or 0.0)
    assert told == sorted(set(told))
    assert told[-1] <= MAX_RETRY_AFTER_S


def test_a_flood_that_does_not_wait_never_pushes_the_time_beyond_a_minute() -> None:
    admissions, limits = Admissions(num_ingresses=1), TenantLimits(max_concurrent_requests=1)
    ticket = admitted(admissions, limits)
    for _ in range(10_000):
        last = refused(admissions, limits).retry_after_s
    assert last == MAX_RETRY_AFTER_S
    admissions.end(ticket, 1.0)
    admitted(admissions, limits, 1.0)
    assert (refused(admissions, limits, 1.0 + MAX_RETRY_AFTER_S).retry_after_s or 0.0) < MAX_RETRY_AFTER_S / 2


def test_clients_that_come_when_they_are_told_are_mostly_admitted() -> None:
    """Thirty clients of a tenant with four places, each served in 3 s, who obey what they are told."""
    admissions, limits = Admissions(num_ingresses=1), TenantLimits(max_concurrent_requests=4)
    events: list[tuple[float, int, Ticket | None]] = [(0.01 * client, client, None) for client in range(30)]
    tries, done, number = 0, 0, 30
    while events:
        now_s, _, ticket = heapq.heappop(events)
        number += 1
        if ticket is not None:
            admissions.end(ticket, now_s)
            done += 1
            continue
        tries += 1
        outcome = admissions.admit("a", limits, num_requests=1, prompt_tokens=10, now_s=now_s)
        if isinstance(outcome, Ticket):
            heapq.heappush(events, (now_s + 3.0, number, outcome))
        else:
            assert outcome.retry_after_s is not None
            heapq.heappush(events, (now_s + outcome.retry_after_s, number, None))
    assert done == 30
    assert tries <= 3 * 30, "what is told does not spread them"
