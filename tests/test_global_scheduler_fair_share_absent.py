"""Goal: an answer is as large as a replica and not as the cluster, and still every replica knows where every tenant stands.

Method: real `TenantService`s of many tenants, each at few replicas at a time, report to a real `FairShare` over a network
that drops messages.
"""

import random
from collections import Counter, deque

import pytest

from cost_service.charges import Account, Served
from cost_service.service_messages import UNTOLD, Answer, Report
from global_scheduler import fair_share
from global_scheduler.fair_share import ABSENT_EVERY, MAX_ABSENT, FairShare
from replicas.tenant_service import TenantService

NUM_TENANTS = 2 * MAX_ABSENT


class Replica:
    """An engine's side of the exchange."""

    def __init__(self, name: str, share: FairShare) -> None:
        self.name, self.share, self.service = name, share, TenantService()
        self.sequence, self.version = 0, UNTOLD
        share.add_replica(name)

    def serve(self, tenant: str, num: int = 1) -> None:
        """A request that comes, is served, and is over."""
        self.service.charge("", self.service.account(tenant, ""), Served(num_output_tokens=num))

    def ask(self, *, report_lost: bool = False) -> Answer | None:
        self.sequence += 1
        report = Report(
            replica=self.name, epoch="e", sequence=self.sequence, accounts=self.service.take_report(self.sequence)
        )
        if report_lost:
            return None
        self.share.take(report)
        return self.share.answer(self.name, "e", since=self.version, named=report.accounts)

    def hear(self, answer: Answer) -> set[str]:
        self.version = answer.version
        self.service.learn(*answer.shares)
        self.service.answered(self.sequence)
        return {each.tenant for each in answer.shares}

    def exchange(self) -> set[str]:
        answer = self.ask()
        assert answer is not None
        return self.hear(answer)


def cluster_of(num_replicas: int) -> tuple[FairShare, list[Replica]]:
    """Replicas that know of `NUM_TENANTS` tenants, all of whom have been served at the first."""
    share = FairShare()
    replicas = [Replica(f"r{number}", share) for number in range(num_replicas)]
    for number in range(NUM_TENANTS):
        replicas[0].serve(f"t{number}")
    for replica in replicas:
        replica.exchange()
    return share, replicas


def serve_all_at(replica: Replica) -> None:
    for number in range(NUM_TENANTS):
        replica.serve(f"t{number}")
    replica.exchange()


def test_a_new_replica_is_told_of_everybody() -> None:
    share, _ = cluster_of(1)
    assert len(Replica("new", share).exchange()) == NUM_TENANTS


def test_of_those_who_are_there_a_replica_hears_every_time_and_of_many_others_every_twentieth() -> None:
    _, (a, b) = cluster_of(2)
    b.service.arrives(b.service.account("t1", ""))
    b.exchange()
    told = []
    for _ in range(2 * ABSENT_EVERY):
        serve_all_at(a)
        told.append(len(b.exchange()))
    assert sorted(told) == [1] * (2 * ABSENT_EVERY - 2) + [NUM_TENANTS] * 2


def test_who_is_named_in_a_report_is_told_of_though_it_has_left_already() -> None:
    _, (a, b) = cluster_of(2)
    serve_all_at(a)
    b.serve("t1", 5)
    assert b.exchange() == {"t1"}
    assert b.service.tenant_key("t1") == 2.0 * (1 + 1 + 5)


def test_while_few_change_a_replica_hears_of_them_at_once() -> None:
    _, (a, b) = cluster_of(2)
    for number in range(MAX_ABSENT):
        a.serve(f"t{number}")
    a.exchange()
    assert len(b.exchange()) == MAX_ABSENT


def test_a_lost_word_of_everybody_is_said_again_in_the_next_answer() -> None:
    _, (a, b) = cluster_of(2)
    serve_all_at(a)
    answers = [b.ask() for _ in range(ABSENT_EVERY)]  # no answer arrives
    assert len(answers[-1].shares if answers[-1] else ()) == NUM_TENANTS
    assert len(b.exchange()) == NUM_TENANTS
    assert not b.exchange(), "it has heard"


def test_who_comes_is_ordered_by_what_was_last_heard_and_by_the_truth_after_an_exchange() -> None:
    _, (a, b) = cluster_of(2)
    b.service.arrives(b.service.account("t2", ""))
    b.exchange()
    for _ in range(3):
        serve_all_at(a)
    b.service.arrives(b.service.account("t1", ""))
    assert b.service.tenant_key("t1") == 2.0, "as of the word of everybody"
    b.exchange()
    assert b.service.tenant_key("t1") == 8.0


def test_a_removed_replicas_tenants_wait_there_no_more_and_others_are_told() -> None:
    share, (a, b) = cluster_of(2)
    a.service.arrives(a.service.account("t1", ""))
    a.exchange()
    b.exchange()
    share.remove_replica("r0")
    assert b.exchange() == {"t1"}
    (word,) = share.answer("r1", "e", since=UNTOLD, named=[Account("t1")]).shares[:1]
    assert (word.tenant, word.waits) == ("t1", False)


def test_all_hear_of_those_who_were_forgotten_that_they_wait_no_more() -> None:
    """Or whoever of them came to another replica would be taken for one that has waited all the time."""
    share = FairShare()
    a, b = Replica("a", share), Replica("b", share)
    accounts = [a.service.account(f"t{number}", "") for number in range(2000)]
    for account in accounts:
        a.service.arrives(account)
    a.exchange()
    waits: dict[str, bool] = {}

    def tell_b() -> None:
        answer = b.ask()
        assert answer is not None
        b.hear(answer)
        waits.update({each.tenant: each.waits for each in answer.shares})

    tell_b()
    assert all(waits.values())
    for number in range(0, 1900, 95):
        for account in accounts[number : number + 95]:
            a.service.leaves(account)
        a.exchange()
        tell_b()
    for _ in range(2 * ABSENT_EVERY):
        a.exchange()
        tell_b()
    assert len(share.counters.tenants) < 200, "who has left without a debt is forgotten"
    assert sum(waits.values()) == 100
    for number in range(3000):  # and what is kept of the forgotten is bounded
        a.serve(f"new-{number}", 0)
        a.exchange()
        tell_b()
    assert len(share._changed) < 1000


class Crowd:
    """Requests that come to a replica, wait, are served in turn and leave."""

    def __init__(self, replica: Replica, chance: random.Random) -> None:
        self.replica, self.chance = replica, chance
        self.here: deque[Account] = deque()

    def comes_and_goes(self) -> list[str]:
        """Returns whose requests were served, each with three tokens."""
        service = self.replica.service
        for _ in range(self.chance.randrange(80)):
            account = service.account(f"t{self.chance.randrange(NUM_TENANTS)}", "")
            if account not in self.here:
                service.arrives(account)
                self.here.append(account)
        served = [self.here.popleft() for _ in range(max(0, len(self.here) - 30))]
        for account in served:
            service.charge("", account, Served(num_output_tokens=3))
            service.leaves(account)
        return [account.tenant for account in served]


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_lost_all_agree_on_those_who_are_there_and_soon_on_everybody(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_share, "MAX_ABSENT", 16)
    chance, num_withheld = random.Random(seed), 0
    share, replicas = cluster_of(3)
    crowds = [Crowd(replica, chance) for replica in replicas]
    served = Counter(f"t{number}" for number in range(NUM_TENANTS))
    for _ in range(300):
        crowd = chance.choice(crowds)
        for tenant in crowd.comes_and_goes():
            served[tenant] += 3
        replica = crowd.replica
        answer = replica.ask(report_lost=chance.random() < 0.1)
        if answer is not None and chance.random() < 0.9:
            num_withheld += answer.version.absent < answer.version.present
            replica.hear(answer)
            for account in crowd.here:
                counter = share.counters.tenants.counter(account.tenant)
                assert replica.service.tenant_key(account.tenant) == pytest.approx(counter)
        replica.service.check()
    assert num_withheld > 100, "it is about those"
    for _ in range(ABSENT_EVERY + 1):
        for replica in replicas:
            replica.exchange()
    share.check()
    assert_agreed(share, replicas, served)


def assert_agreed(share: FairShare, replicas: list[Replica], served: Counter[str]) -> None:
    for tenant, num in served.items():
        assert share.ledger.delivered(tenant).num_output_tokens == num, "to the token"
        if tenant in share.counters.tenants:
            counter = share.counters.tenants.counter(tenant)
            for replica in replicas:
                key = replica.service.tenant_key(tenant)
                keeps_a_lift = replica.service._tenants.standings[tenant].lifted is not None  # that nobody has seen
                assert key == pytest.approx(counter) or (keeps_a_lift and key > counter), tenant
