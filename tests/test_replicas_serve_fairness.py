"""Goal: a replica hands on what its engine says and takes back what the cluster knows, loses nothing on the way, and floods
no engine that does not read.

Method: a real channel with an engine's real accounts at its end, and the real fairness service behind the actor's method.
tests/test_global_scheduler_fairness_actor.py and tests/test_ray_serve.py have the actor itself.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from cost_service import named_actor
from cost_service.charges import Served
from global_scheduler.fair_share import ABSENT_EVERY, MAX_ABSENT
from global_scheduler.fairness_service import FairnessService
from replicas.channel import EngineEnd, ServerEnd
from replicas.messages import EngineTotals, ServiceReport, SetShares
from replicas.serve_fairness import MAX_UNREAD, FairnessExchange
from replicas.tenant_service import TenantService


class Actor:
    """What Ray's handle is to the exchange: methods with `remote`."""

    def __init__(self, service: FairnessService) -> None:
        self.service = service
        self.exchange = self
        self.fails = False

    async def remote(self, data: bytes) -> bytes:
        if self.fails:
            raise ConnectionError("gone")
        return self.service.exchange(data, 0.0)


class Engine:
    """An engine's end: accounts, and what `replicas.vllm_admission` does with the messages."""

    def __init__(self, address: str, epoch: str = "e") -> None:
        self.end, self.epoch, self.sequence, self.num_totals = EngineEnd(address), epoch, 0, 0
        self.accounts = TenantService()
        self.taken: list[SetShares] = []
        self.tells_everything = False

    def serve(self, tenant: str, num: int) -> None:
        self.accounts.charge("", self.accounts.account(tenant, "u"), Served(num_output_tokens=num))

    def step(self) -> None:
        for message in self.end.receive():
            assert isinstance(message, SetShares)
            self.taken.append(message)
            self.tells_everything |= message.wants_everything
            for share in message.shares:
                self.accounts.learn(share)
            self.accounts.answered(message.answered)

    def report(self) -> None:
        self.num_totals += 1
        numbers = dict.fromkeys(EngineTotals.__struct_fields__, 1)
        names = {"epoch": self.epoch, "preemption": "adaptive", "admission": "fair", "service_kind": "tokens"}
        self.end.send(
            EngineTotals(**numbers | names | {"guarded": False, "service": self.accounts.total, "backlog": {}})
        )
        self.sequence += 1
        everything, self.tells_everything = self.tells_everything, False
        accounts = self.accounts.take_report(self.sequence, everything=everything)
        if accounts or everything:
            known = dict(self.accounts.known()) if everything else None
            lines = list(accounts.items())
            self.end.send(ServiceReport(epoch=self.epoch, sequence=self.sequence, accounts=lines, known=known))


class Replica:
    """Server and engine of one replica."""

    def __init__(self, name: str) -> None:
        self.channel = ServerEnd()
        self.exchange = FairnessExchange(self.channel, lambda away: None, pool="app/m", replica=name)
        self.engine = Engine(self.channel.address)

    async def hear(self) -> None:
        """Let the server take all that its engine has sent."""
        while True:
            try:
                message = await asyncio.wait_for(self.channel.receive(), 0.05)
            except TimeoutError:
                return
            if isinstance(message, ServiceReport):
                self.exchange.add(message)
            elif isinstance(message, EngineTotals):
                self.exchange.note(message, 0.0)

    async def turn(self, actor: Actor) -> None:
        """One interval of a working engine."""
        self.engine.report()
        await self.hear()
        await self.exchange._exchange(actor)
        await asyncio.sleep(0.02)  # until the socket has handed it over
        self.engine.step()

    def close(self) -> None:
        self.engine.end.close()
        self.channel.close()


def service() -> FairnessService:
    return FairnessService(life="one", now_s=0.0)


def run(test: Callable[[Replica, Replica], Coroutine[Any, Any, None]]) -> None:
    async def body() -> None:
        replicas = Replica("a"), Replica("b")
        try:
            await test(*replicas)
        finally:
            for replica in replicas:
                replica.close()

    asyncio.run(body())


def delivered(one: FairnessService, tenant: str) -> int:
    (pool,) = one.status()["pools"].values()
    return int({each["tenant"]: each["delivered"]["num_output_tokens"] for each in pool["tenants"]}[tenant])


def test_what_one_engine_serves_the_other_knows() -> None:
    async def test(a: Replica, b: Replica) -> None:
        actor = Actor(service())
        a.engine.serve("f", 30)
        await a.turn(actor)
        b.engine.serve("f", 5)
        await b.turn(actor)
        await a.turn(actor)
        assert a.engine.accounts.tenant_key("f") == b.engine.accounts.tenant_key("f") == 70.0
        assert delivered(actor.service, "f") == 35

    run(test)


def test_of_many_who_are_not_there_an_engine_hears_in_every_twentieth_answer_and_at_once_when_they_come() -> None:
    async def test(a: Replica, b: Replica) -> None:
        actor, names = Actor(service()), [f"t{number}" for number in range(MAX_ABSENT + 2)]
        told = []
        for number in range(ABSENT_EVERY + 3):
            if number in (0, 3):  # and never again: what is not told of now is told of later
                for name in names:
                    a.engine.serve(name, 1)
            await a.turn(actor)
            if number == 5:
                b.engine.serve("t7", 100)
            before = len(b.engine.taken)
            await b.turn(actor)
            told.append(sum(len(message.shares) for message in b.engine.taken[before:]))
            if number == 5:
                assert b.engine.accounts.tenant_key("t7") == 2.0 * (2 + 100), "it has come: it is told of at once"
        assert told[0] == len(names), "whoever is new is told of everybody"
        assert [num for num in told[1:] if num] == [1, len(names)]
        assert {b.engine.accounts.tenant_key(name) for name in names if name != "t7"} == {4.0}

    run(test)


def test_while_the_actor_is_away_the_engine_goes_on_and_all_of_it_is_told_afterwards() -> None:
    async def test(a: Replica, b: Replica) -> None:
        actor = Actor(service())
        a.engine.serve("f", 1)
        await a.turn(actor)
        actor.fails = True
        for _ in range(3):
            a.engine.serve("f", 10)
            a.engine.serve("g", 10)
            with pytest.raises(ConnectionError):
                await a.turn(actor)
        assert a.engine.accounts.tenant_key("g") == 60.0, "its own counters go on"
        actor.fails = False
        await a.turn(actor)
        assert (delivered(actor.service, "f"), delivered(actor.service, "g")) == (31, 30)

    run(test)


def test_a_scheduler_that_lost_all_is_told_everything_once_and_charges_nothing_twice() -> None:
    async def test(a: Replica, b: Replica) -> None:
        actor = Actor(service())
        for replica in (a, b):
            replica.engine.serve("f", 50)
            await replica.turn(actor)
            await replica.turn(actor)
        actor.service = FairnessService(life="two", now_s=0.0)
        for _ in range(4):
            for replica in (a, b):
                replica.engine.serve("f", 1)
                await replica.turn(actor)
        for replica in (a, b):
            assert sum(message.wants_everything for message in replica.engine.taken) == 1
        await a.turn(actor)
        assert delivered(actor.service, "f") == 108
        key = a.engine.accounts.tenant_key("f")
        assert 212.0 <= key <= 216.0, "but for what each had served since it was last answered, at most"
        assert key == b.engine.accounts.tenant_key("f"), "all agree"

    run(test)


def test_an_engine_that_does_not_read_is_sent_few_messages_and_misses_nothing() -> None:
    async def test(a: Replica, b: Replica) -> None:
        actor = Actor(service())
        b.engine.serve("f", 1)
        await b.turn(actor)
        for _ in range(20):  # b is idle: it reads and reports nothing
            a.engine.serve("f", 10)
            await a.turn(actor)
            await b.exchange._exchange(actor)
        before = len(b.engine.taken)
        b.engine.step()
        assert len(b.engine.taken) - before <= MAX_UNREAD
        await b.turn(actor)
        await b.turn(actor)
        assert b.engine.accounts.tenant_key("f") == 2.0 * 201

    run(test)


def test_another_life_of_the_engine_begins_anew() -> None:
    async def test(a: Replica, b: Replica) -> None:
        actor = Actor(service())
        b.engine.serve("f", 7)
        await b.turn(actor)
        a.engine.serve("f", 50)
        await a.turn(actor)
        a.engine.end.close()
        await asyncio.sleep(0.1)  # the socket has one peer at a time
        a.engine = Engine(a.channel.address, "e2")
        a.engine.serve("f", 3)
        await a.turn(actor)
        assert delivered(actor.service, "f") == 60
        assert a.engine.accounts.tenant_key("f") == 120.0

    run(test)


def test_the_interval_is_the_one_that_the_actor_asks_for_and_an_actor_that_is_away_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    told: list[bool] = []

    class Enough(BaseException):
        """Ends the loop, which no `Exception` may."""

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 4:
            raise Enough

    async def body() -> None:
        replica = Replica("a")
        replica.exchange._say_degraded = told.append
        try:
            replica.engine.report()
            await replica.hear()
            with monkeypatch.context() as patch:
                patch.setattr("cost_service.named_actor.asyncio.sleep", sleep)
                await replica.exchange.run()
        finally:
            replica.close()

    actor = Actor(service())
    monkeypatch.setattr("global_scheduler.fairness_service.INTERVAL_S", 0.7)
    monkeypatch.setattr(named_actor, "find_actor", lambda name: None if len(waits) == 1 else actor)
    with pytest.raises(Enough):
        asyncio.run(body())
    assert waits == [0.1, 0.1, 0.7, 0.7]
    assert told == [True, False]
