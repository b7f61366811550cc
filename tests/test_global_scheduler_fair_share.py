"""Goal: replicas and scheduler agree on every counter whatever is lost on the way; a scheduler that dies comes back right.

Method: real `TenantService`s report to a real `FairShare` over a network that drops and repeats, while the scheduler is
killed at random points. `-s` prints reports per second with 10,000 tenants.
"""

import json
import math
import random
import time

import pytest

from cost_service.charges import SYSTEM, Account, Served, ServiceUnit
from cost_service.service_messages import UNTOLD, AccountReport, Answer, Report, Version
from global_scheduler.bound import FairnessBound, VictimRule
from global_scheduler.fair_share import FairShare
from global_scheduler.fairness_checker import FairnessChecker
from global_scheduler.ledger import Ledger
from global_scheduler.level import MAX_DEBTORS
from replicas.tenant_service import TenantService

F, G = Account("f", "u"), Account("g", "u")
UNIT = ServiceUnit()


class Replica:
    """One engine's side of the exchange."""

    def __init__(self, name: str) -> None:
        self.name, self.sequence, self.version, self.life = name, 0, UNTOLD, 0
        self.service = TenantService()
        for account in (F, G):
            self.service.arrives(self.service.account(*account))

    def report(self, *, everything: bool = True) -> Report:
        self.sequence += 1
        accounts = self.service.take_report(self.sequence, everything=everything)
        return Report(replica=self.name, epoch=f"{self.name}-0", sequence=self.sequence, accounts=accounts)

    def learn(self, answer: Answer) -> None:
        self.version = answer.version
        for share in answer.shares:
            self.service.learn(share)

    def exchange(self, share: FairShare) -> None:
        share.take(self.report())
        self.service.answered(self.sequence)
        self.learn(share.answer(self.name, f"{self.name}-0", since=self.version))


def share_of(*names: str) -> FairShare:
    share = FairShare()
    for name in names:
        share.add_replica(name)
    return share


def test_a_replica_knows_what_all_have_served_and_its_own_since() -> None:
    share, a, b = share_of("a", "b"), Replica("a"), Replica("b")
    a.service.charge("", F, Served(num_output_tokens=50))
    a.exchange(share)
    b.service.charge("", F, Served(num_output_tokens=7))
    b.exchange(share)
    a.service.charge("", F, Served(num_output_tokens=1))
    a.learn(share.answer("a", "a-0", since=a.version))
    assert b.service.tenant_key("f") == 2 * 57
    assert a.service.tenant_key("f") == 2 * 58
    assert a.service.user_key(F) == 2 * 51, "with one user there is nothing to order, and nothing is told"


def test_users_are_ordered_by_what_all_replicas_have_served_them() -> None:
    share, a, b = share_of("a", "b"), Replica("a"), Replica("b")
    for replica in (a, b):
        replica.service.arrives(replica.service.account("f", "v"))
        replica.exchange(share)
    for user, num in (("u", 50), ("v", 3)):
        b.service.charge("", b.service.account("f", user), Served(num_output_tokens=num))
        a.service.charge("", a.service.account("f", user), Served(num_output_tokens=1))
    a.exchange(share)
    b.exchange(share)
    a.exchange(share)
    u, v = (a.service.user_key(Account("f", user)) for user in "uv")
    assert u - v == 2 * (50 - 3)


def test_an_answer_holds_what_changed_alone() -> None:
    share, a = share_of("a", "b"), Replica("a")
    a.exchange(share)
    assert share.answer("a", "a-0", since=a.version).shares == []
    a.service.charge("", G, Served(num_output_tokens=1))
    share.take(a.report(everything=False))
    assert [each.tenant for each in share.answer("a", "a-0", since=a.version).shares] == ["g"]
    assert {each.tenant for each in share.answer("b", "b-0", since=UNTOLD).shares} == {"f", "g"}


def test_what_is_reserved_elsewhere_counts_and_what_is_reserved_here_counts_once() -> None:
    share, a, b = share_of("a", "b"), Replica("a"), Replica("b")
    a.service.hold("x", F, 300.0)
    a.exchange(share)
    b.exchange(share)
    assert a.service.tenant_key("f") == b.service.tenant_key("f") == 300.0
    share.remove_replica("a")
    b.exchange(share)
    assert b.service.tenant_key("f") == 0.0, "what died with a replica is not served"


def test_the_systems_work_is_booked_and_nobodys() -> None:
    share, a = share_of("a"), Replica("a")
    a.service.charge_system(Served(num_input_tokens=900))
    a.exchange(share)
    assert share.ledger.delivered(SYSTEM) == Served(num_input_tokens=900)
    assert SYSTEM not in share.counters.tenants
    assert a.service.tenant_key("f") == 0.0


def test_a_new_weight_reaches_the_replicas() -> None:
    share, a = share_of("a"), Replica("a")
    a.exchange(share)
    share.set_weight("f", 4.0)
    a.exchange(share)
    a.service.charge("", F, Served(num_output_tokens=2))
    assert a.service.tenant_key("f") == 1.0


def test_a_new_weight_reaches_a_replica_that_has_nothing_new_to_say() -> None:
    share, a = share_of("a"), Replica("a")
    a.exchange(share)
    share.set_weight("f", 4.0)
    shares = share.answer("a", "a-0", since=a.version).shares
    assert [(each.tenant, each.weight) for each in shares] == [("f", 4.0)]


def test_what_was_reserved_at_a_removed_replica_is_given_back_in_the_next_answer() -> None:
    share, a, b = share_of("a", "b"), Replica("a"), Replica("b")
    a.service.hold("x", F, 300.0)
    a.exchange(share)
    b.exchange(share)
    share.remove_replica("a")
    b.learn(share.answer("b", "b-0", since=b.version))
    assert b.service.tenant_key("f") == 0.0


def test_a_restored_scheduler_of_an_older_version_answers_everything() -> None:
    share, a = share_of("a"), Replica("a")
    a.exchange(share)
    fresh = share_of("a")
    assert fresh.answer("a", "a-0", since=a.version).shares == []
    fresh.take(a.report(), known=a.service.known())
    assert {each.tenant for each in fresh.answer("a", "a-0", since=Version(10**6, 10**6)).shares} == {"f", "g"}


def test_what_a_lost_report_said_is_said_again_until_it_is_answered() -> None:
    share, a = share_of("a"), Replica("a")
    a.exchange(share)
    a.service.charge("", F, Served(num_output_tokens=9))
    a.service.leaves(F)
    a.report(everything=False)  # lost
    late = a.report(everything=False)
    a.service.charge("", G, Served(num_output_tokens=1))
    share.take(a.report(everything=False))
    share.take(late)
    assert share.ledger.delivered("f") == Served(num_output_tokens=9)
    assert not share.counters.tenants.is_waiting("f"), "a tenant that waits for ever would hold every lift down"
    a.service.answered(a.sequence)
    assert a.report(everything=False).accounts == {}


def test_what_changes_while_a_report_is_on_its_way_is_not_taken_for_answered() -> None:
    a = Replica("a")
    a.report(everything=False)
    a.service.charge("", F, Served(num_output_tokens=9))
    a.service.answered(1)
    assert set(a.report(everything=False).accounts) == {F}


@pytest.mark.parametrize("late_word", [False, True], ids=["in order", "a late word of the dead engine"])
def test_a_restarted_engine_leaves_nobody_waiting_who_waits_no_more(late_word: bool) -> None:
    share, old = share_of("a"), Replica("a")
    old.service.hold("x", F, 300.0)
    share.take(old.report())
    old.sequence += 1
    word = Report(replica="a", epoch="a-0", sequence=old.sequence, accounts=old.service.take_report(2, everything=True))
    new = TenantService()
    new.arrives(new.account("h", "u"))
    lines = new.take_report(1)
    share.take(Report(replica="a", epoch="a-1", sequence=1, accounts=lines))
    if late_word:
        share.take(word)
        assert share.counters.tenants.is_waiting("f"), "for one interval"
    share.take(Report(replica="a", epoch="a-1", sequence=2, accounts={}))
    assert {name for name in "fgh" if share.counters.tenants.is_waiting(name)} == {"h"}
    assert share.answer("b", "b-0", since=UNTOLD).shares[0].known.counter < 300.0, (
        "what died with the engine is not reserved"
    )
    share.check()


@pytest.mark.parametrize("counter", [math.nan, math.inf, -1.0, 2.0**53])
def test_an_impossible_counter_is_refused_and_nothing_has_changed(counter: float) -> None:
    share, a = share_of("a"), Replica("a")
    a.service.charge("", F, Served(num_output_tokens=9))
    with pytest.raises(ValueError, match="counter of 'g' at 'a'"):
        share.take(a.report(), known={"f": 5.0, "g": counter})
    assert share.version == 0
    assert share.ledger.delivered("f") == Served()
    assert "f" not in share.counters.tenants


def test_a_new_replica_hears_of_an_old_debt_however_many_have_come_and_gone() -> None:
    share, a = share_of("a", "b"), Replica("a")
    a.service.charge("", F, Served(num_output_tokens=10**6))
    a.exchange(share)
    for number in range(300):
        stranger = a.service.account(f"x{number}", "")
        a.service.arrives(stranger)
        a.exchange(share)
        a.service.leaves(stranger)
        a.exchange(share)
    assert "f" in {each.tenant for each in share.answer("b", "b-0", since=UNTOLD).shares}


class Exchange:
    """Two replicas, and a scheduler that may die at any point."""

    def __init__(self, *, stores: bool, seed: int) -> None:
        self.chance = random.Random(seed)
        self.replicas = [Replica("a"), Replica("b")]
        self.share = share_of("a", "b")
        for each in self.replicas:  # before anything is served: whom nobody has heard of is lifted as a newcomer
            each.exchange(self.share)
        self.state = json.dumps(self.share.state()) if stores else None
        self.life = 0
        self.served = {"f": 0.0, "g": 0.0}
        self.lost = 0.0
        self.alone = {"a": 0.0, "b": 0.0}
        """Service that a replica has given since it was last answered."""

    def serve(self) -> Replica:
        replica, account = self.chance.choice(self.replicas), self.chance.choice([F, G])
        amount = Served(num_output_tokens=self.chance.randrange(1, 20))
        replica.service.charge("", account, amount)
        self.served[account.tenant] += UNIT.service(amount)
        self.alone[replica.name] += UNIT.service(amount)
        return replica

    def report(self, replica: Replica) -> None:
        known = replica.service.known() if replica.life != self.life else None
        report = replica.report(everything=replica.life != self.life)
        if self.chance.random() < 0.2:  # lost
            return
        self.share.take(report, known=known)
        if self.chance.random() < 0.2:  # repeated
            self.share.take(report, known=known)
        replica.life = self.life
        if self.chance.random() < 0.2:  # the answer is lost
            return
        replica.service.answered(report.sequence)
        replica.learn(self.share.answer(replica.name, f"{replica.name}-0", since=UNTOLD))
        self.alone[replica.name] = 0.0

    def die_and_come_back(self) -> None:
        self.life += 1
        self.lost += sum(self.alone.values())
        self.share = FairShare()
        if self.state is not None:
            self.share.restore(json.loads(self.state))
        for each in self.chance.sample(self.replicas, 2):
            self.share.add_replica(each.name)
            self.share.take(each.report(), known=each.service.known())
            each.life = self.life
        for each in self.replicas:
            each.learn(self.share.answer(each.name, f"{each.name}-0", since=UNTOLD))
            self.alone[each.name] = 0.0


def test_a_restored_scheduler_lifts_nobody_whose_report_comes_after_anothers() -> None:
    share, a, b = share_of("a", "b"), Replica("a"), Replica("b")
    for replica in (a, b):
        replica.exchange(share)
    restored = FairShare()
    restored.restore(json.loads(json.dumps(share.state())))
    b.service.charge("", F, Served(num_output_tokens=500))
    a.service.charge("", G, Served(num_output_tokens=100))
    for replica in (b, a):
        restored.take(replica.report(), known=replica.service.known())
    assert restored.counters.tenants.counter("f") == 1000.0
    assert restored.counters.tenants.counter("g") == 200.0, "it has waited all the time"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("stores", [True, False], ids=["state stored", "nothing stored"])
def test_a_scheduler_killed_a_hundred_times_counts_nothing_twice(stores: bool, seed: int) -> None:
    cluster = Exchange(stores=stores, seed=seed)
    for _ in range(100):
        for _ in range(cluster.chance.randrange(1, 25)):
            replica = cluster.serve()
            if cluster.chance.random() < 0.5:
                cluster.report(replica)
            if stores and cluster.chance.random() < 0.2:
                cluster.state = json.dumps(cluster.share.state())
        cluster.die_and_come_back()
        cluster.share.check()
        for tenant, service in cluster.served.items():
            counter = cluster.share.counters.tenants.counter(tenant)
            assert counter <= service + 1e-6, "counted twice"
            if stores:
                assert counter == pytest.approx(service), "cumulative totals lose nothing"
            else:
                assert counter >= service - cluster.lost - 1e-6, "more was lost than one interval of each replica"


def test_a_tenant_that_an_engine_forgot_has_its_debt_and_its_total_when_it_returns() -> None:
    share, a = share_of("a"), Replica("a")
    a.service = TenantService(max_tenants=2, idle_reports=3)
    a.service.charge("", a.service.account("debt", ""), Served(num_output_tokens=500))
    for number in range(12):
        a.service.charge("", a.service.account(f"t{number}", ""), Served(num_output_tokens=1))
        share.take(a.report(everything=False))
        a.service.answered(a.sequence)
        a.learn(share.answer("a", "a-0", since=a.version))
    assert Account("debt") not in a.service.totals()
    a.service.charge("", a.service.account("debt", ""), Served(num_output_tokens=2))
    share.take(a.report(everything=False))
    a.learn(share.answer("a", "a-0", since=a.version))
    assert a.service.tenant_key("debt") == 1004.0
    assert share.ledger.delivered("debt") == Served(num_output_tokens=502)
    share.check()


@pytest.mark.parametrize("num_thousands", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_million_tenants_pass_through_in_bounded_memory(num_thousands: int) -> None:
    """In reports of a thousand each, who come, are served and leave; an engine forgets them a report later. All leave with a
    debt, for one who waits all the time is held back.
    """
    share = share_of("a")
    share.ledger = Ledger(max_tenants=5000)
    share.add_replica("a")
    held_back = AccountReport(served=Served(), num_waiting=1)
    share.take(Report(replica="a", epoch="e", sequence=0, accounts={F: held_back}))
    sizes, version = [], UNTOLD
    for number in range(1, num_thousands + 1):
        names = [f"t{number}-{each}" for each in range(1000)]
        lines = {Account(name): AccountReport(served=Served(num_output_tokens=3), era=number) for name in names}
        before = (f"t{number - 1}-{each}" for each in range(1000)) if number > 1 else ()
        lines |= {Account(name): AccountReport(served=Served(), era=number) for name in before}
        share.take(Report(replica="a", epoch="e", sequence=number, accounts=lines))
        version = share.answer("a", "e", since=version).version
        if number in (num_thousands // 2, num_thousands):
            num_answered = len(share.answer("a", "e", since=UNTOLD).shares)
            sizes.append([len(share.counters.tenants), len(share.ledger.state()["delivered"]), num_answered])
    share.check()
    delivered = share.ledger.forgotten.num_output_tokens + sum(
        each[2] for each in share.state()["ledger"]["delivered"].values()
    )
    assert delivered == 3000 * num_thousands
    for num_counters, num_sums, num_answered in sizes:
        assert num_counters <= MAX_DEBTORS + 1001
        assert num_sums <= 1.1 * 5000
        assert num_answered <= 2 * (MAX_DEBTORS + 1001) + 64


def test_ten_thousand_tenants_cost_microseconds_and_bounded_memory() -> None:
    chance = random.Random(5)
    share = share_of(*(f"r{number}" for number in range(8)))
    services = [TenantService() for _ in range(8)]
    bound = FairnessBound(
        prompt_service=0.0,
        memory_service=1e9,
        num_memory_tokens=1,
        refill_service=0.0,
        unheard_service=0.0,
        stale_service=0.0,
        decode_stale_service=0.0,
        victims=VictimRule.MOST_SERVED,
    )
    checker = FairnessChecker(bound)
    accounts = [services[0].account(f"t{number}", "") for number in range(10_000)]
    for service in services:
        for account in accounts:
            service.account(*account)
    for account in accounts:
        services[0].arrives(account)
        checker.set_waiting(account.tenant, True)
    share.take(Report(replica="r0", epoch="e", sequence=0, accounts=services[0].take_report(0)))
    services[0].answered(0)
    merging_s = checking_s = 0.0
    versions = [Version(share.version, share.version)] * 8
    num_shares = 0
    for sequence in range(1, 1001):
        number = sequence % 8
        for account in chance.sample(accounts, 20):
            services[number].charge("", account, Served(num_output_tokens=chance.randrange(1, 9)))
            began_s = time.perf_counter()
            checker.serve(account.tenant, 10.0)
            checking_s += time.perf_counter() - began_s
        report = Report(
            replica=f"r{number}", epoch="e", sequence=sequence, accounts=services[number].take_report(sequence)
        )
        services[number].answered(sequence)
        began_s = time.perf_counter()
        share.take(report)
        answer = share.answer(f"r{number}", "e", since=versions[number])
        merging_s += time.perf_counter() - began_s
        versions[number] = answer.version
        num_shares += len(answer.shares)
    print(
        f"\n10,000 tenants: {1000 / merging_s:.0f} reports of 20 tenants a second, answers of {num_shares / 1000:.0f};"
        f" checker {checking_s / 20_000 * 1e6:.1f} us an event"
    )
    share.check()
    assert len(share.counters.tenants) == 10_000
    for account in accounts:
        services[0].leaves(account)
    share.take(Report(replica="r0", epoch="e", sequence=2000, accounts=services[0].take_report(2000)))
    assert len(share.counters.tenants) < 10_000, "who has left without debt is forgotten"
