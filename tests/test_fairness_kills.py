"""Goal: a scheduler that is killed at any point counts nothing twice and loses at most an interval of accounting.

Method: replicas with the product's `TenantService` serve, report, restart and forget; reports and answers are lost, repeated
and overtake each other. One scheduler hears all that arrives and is killed at 1,000 random points, from states stored up to
a second ago or from nothing; its twin hears the same, and is never killed.
"""

import json
import random
from collections import Counter

import pytest

from cost_service.charges import NOTHING, Account, Served, ServiceUnit
from cost_service.service_messages import UNTOLD, Report
from global_scheduler.fair_share import FairShare
from replicas.tenant_service import TenantService

UNIT = ServiceUnit()
ACCOUNTS = [Account("f", "u"), Account("f", "v"), Account("g", "u"), Account("h", "u")]
REPORTS_PER_STATE = 20
"""Two replicas that report every 100 ms, and a state that is stored every second."""


class Engine:
    """One replica: its engine may restart, and what it has served is never forgotten here."""

    def __init__(self, name: str) -> None:
        self.name, self.life, self.sequence, self.knows_life = name, -1, 0, 0
        self.unreported: Counter[str] = Counter()
        """Service by tenant that no scheduler has heard of."""

        self.unstored: Counter[str] = Counter()
        """Service that no stored state holds."""

        self.to_repeat: Counter[str] = Counter()
        """Service that a scheduler had heard of which was killed, and the present one has not."""

        self.service = TenantService()
        self.restart()

    def restart(self) -> None:
        self.life += 1
        self.sequence = 0
        self.service = TenantService()
        for account in ACCOUNTS:
            self.service.arrives(self.service.account(*account))

    @property
    def epoch(self) -> str:
        return f"{self.name}/{self.life}"

    def report(self, *, everything: bool) -> Report:
        self.sequence += 1
        accounts = self.service.take_report(self.sequence, everything=everything)
        return Report(replica=self.name, epoch=self.epoch, sequence=self.sequence, accounts=accounts)


class Killed:
    """Engines, the scheduler that is killed, its twin, and what engines have given."""

    def __init__(self, seed: int, *, stores: bool) -> None:
        self.chance, self.stores, self.life = random.Random(seed), stores, 0
        self.engines = [Engine("a"), Engine("b")]
        self.share, self.twin = self.fresh(), self.fresh()
        self.given: dict[str, Served] = {}
        """By tenant, by all engines that ever were."""

        self.late: list[Report] = []
        self.unheard: Counter[str] = Counter()
        """What engines had not reported when they died."""

        self.at_risk: Counter[str] = Counter()
        """What they had, and no stored state holds."""

        self.lost: Counter[str] = Counter()
        """What was at risk when the scheduler was killed, or was not repeated before its engine died, too."""

        for engine in self.engines:
            self.report(engine, arrives=True)
        self.num_reports = 0
        self.store()

    def fresh(self) -> FairShare:
        share = FairShare()
        for engine in self.engines:
            share.add_replica(engine.name)
        return share

    def serve(self, engine: Engine) -> None:
        account, chance = self.chance.choice(ACCOUNTS), self.chance
        served = Served(chance.randrange(50), chance.randrange(20), chance.randrange(1, 20), chance.randrange(999))
        engine.service.charge("", engine.service.account(*account), served)
        tenant = account.tenant
        self.given[tenant] = self.given.get(tenant, NOTHING).plus(served)
        engine.unreported[tenant] += UNIT.service(served)
        engine.unstored[tenant] += UNIT.service(served)

    def report(self, engine: Engine, *, arrives: bool = False) -> None:
        """One report; it may be lost, or come late, twice, or without an answer."""
        is_new = engine.knows_life != self.life
        known = engine.service.known() if is_new else None
        report = engine.report(everything=is_new or engine.sequence == 0)
        what = "arrives" if arrives else self.chance.choice(["arrives"] * 6 + ["lost", "late", "twice", "unanswered"])
        if what in ("lost", "late"):
            self.late += [report] if what == "late" and not is_new else []
            return
        for _ in range(2 if what == "twice" else 1):
            self.share.take(report, known=known)
            self.twin.take(report)
        engine.knows_life = self.life
        engine.unreported.clear()
        engine.to_repeat.clear()
        if what != "unanswered":
            engine.service.answered(report.sequence)
            for share in self.share.answer(engine.name, engine.epoch, since=UNTOLD).shares:
                engine.service.learn(share)

    def overtaken(self) -> None:
        """A report that was overtaken arrives; it may be of an engine that is no more."""
        if self.late:
            report = self.late.pop(self.chance.randrange(len(self.late)))
            before = {tenant: UNIT.service(raw(self.share, tenant)) for tenant in "fgh"}
            for share in (self.share, self.twin):
                share.take(report)
            if report.epoch not in (engine.epoch for engine in self.engines):  # nobody will say it again
                self.at_risk.update({each: UNIT.service(raw(self.share, each)) - before[each] for each in before})

    def restart(self, engine: Engine) -> None:
        self.unheard += engine.unreported
        self.lost += engine.to_repeat
        self.at_risk += engine.unstored - engine.unreported - engine.to_repeat
        engine.to_repeat.clear()
        engine.unreported.clear()
        engine.unstored.clear()
        engine.restart()

    def store(self) -> None:
        self.state = json.dumps(self.share.state())
        self.at_risk.clear()
        for engine in self.engines:
            engine.unstored = engine.unreported + engine.to_repeat

    def kill(self) -> None:
        """All that was not stored is gone; engines find out with their next report."""
        self.life += 1
        self.lost += self.at_risk
        self.at_risk.clear()
        for engine in self.engines:
            engine.to_repeat = engine.unstored - engine.unreported
        self.share = self.fresh()
        if self.stores:
            self.share = FairShare()
            self.share.restore(json.loads(self.state))
        self.late.clear()  # connections died with it

    def settle(self) -> None:
        """Last words of all engines arrive."""
        for engine in self.engines:
            self.report(engine, arrives=True)

    def step(self) -> None:
        for _ in range(self.chance.randrange(1, 8)):
            self.serve(self.chance.choice(self.engines))
        if self.chance.random() < 0.02:
            self.restart(self.chance.choice(self.engines))
        if self.chance.random() < 0.1:
            self.overtaken()
        self.report(self.chance.choice(self.engines))
        self.num_reports += 1
        if self.num_reports % REPORTS_PER_STATE == 0:
            self.store()


def raw(share: FairShare, tenant: str) -> Served:
    return share.ledger.delivered(tenant)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_250_random_points_each_with_a_state_of_the_last_second(seed: int) -> None:
    """Whatever engines still know is counted once; what only a dead engine knew is lost, up to a state's age of it."""
    cluster = Killed(seed, stores=True)
    for _ in range(250):
        for _ in range(cluster.chance.randrange(1, 12)):
            cluster.step()
        cluster.kill()
        cluster.share.check()
        for tenant, given in cluster.given.items():
            for share in (cluster.share, cluster.twin):
                assert all(a <= b for a, b in zip(raw(share, tenant), given, strict=True)), "counted twice"
    cluster.settle()
    cluster.share.check()
    assert cluster.lost, "some engine died between two states before a kill"
    for tenant, given in cluster.given.items():
        counter, twin = (each.counters.tenants.counter(tenant) for each in (cluster.share, cluster.twin))
        assert twin - cluster.lost[tenant] - 1e-6 <= counter <= twin + 1e-6
        missing = UNIT.service(given) - UNIT.service(raw(cluster.share, tenant))
        assert 0.0 <= missing <= cluster.lost[tenant] + cluster.unheard[tenant] + 1e-6


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stores", [True, False], ids=["state of the last second", "nothing stored"])
def test_killed_at_250_random_points_with_engines_that_live_on(seed: int, stores: bool) -> None:
    cluster = Killed(seed, stores=stores)
    cluster.restart = lambda engine: None  # type: ignore[method-assign]
    most = dict.fromkeys("fgh", 0.0)
    for _ in range(250):
        for _ in range(cluster.chance.randrange(1, 12)):
            cluster.step()
        cluster.settle()
        in_interval: Counter[str] = Counter()
        for _ in range(2):
            for engine in cluster.engines:
                cluster.serve(engine)
        for engine in cluster.engines:
            in_interval += engine.unreported
        cluster.kill()
        cluster.settle()
        cluster.share.check()
        for tenant in "fgh":
            counter, twin = (each.counters.tenants.counter(tenant) for each in (cluster.share, cluster.twin))
            assert counter <= twin + 1e-6, "counted twice"
            most[tenant] += 0.0 if stores else in_interval[tenant]
            assert counter >= twin - most[tenant] - 1e-6, "more than one interval was lost at each kill"
            assert raw(cluster.share, tenant) == cluster.given[tenant], "the ledger has every token again"
