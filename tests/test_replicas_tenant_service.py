"""Goal: an engine's own word of who has had what is right while requests come, go, come back, and while time is the unit.

Method: queues over one `TenantService`, as an engine has two; random histories in seconds.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_service.charges import NOTHING, Account, Served, ServiceKind, ServiceUnit
from cost_service.service_messages import AccountReport, Known, Share
from replicas.fair_queue import FairQueue, Waiting, first_of
from replicas.tenant_service import TenantService


def waiting(queue: FairQueue, name: str, tenant: str, *, held: float = 0.0) -> Waiting:
    return Waiting(request_id=name, account=queue.service.account(tenant, ""), held=held)


def serve(queue: FairQueue, tenant: str, num_output_tokens: int) -> None:
    queue.service.charge("", queue.service.account(tenant, ""), Served(num_output_tokens=num_output_tokens))


def test_a_request_that_is_not_ready_costs_its_tenant_no_claim_in_any_step() -> None:
    service = TenantService()
    fresh, skipped = FairQueue(service), FairQueue(service)
    for name, tenant in (("f0", "f"), ("f1", "f"), ("g0", "g")):
        fresh.add(waiting(fresh, name, tenant, held=10.0))
    serve(fresh, "f", 500)
    for step in range(3):
        for queue in (fresh, skipped):
            queue.begin_step(float(step))
        chosen = first_of(skipped, fresh)
        assert chosen is not None
        assert chosen.peek().request_id == "g0"
        skipped.add(chosen.pop(), front=True)  # as vLLM does with a request that waits for its KV blocks
        assert service.tenant_key("g") == 0.0
    skipped.begin_step(9.0)
    skipped.pop()
    skipped.begin_step(10.0)
    skipped.add(waiting(skipped, "g1", "g"))
    assert service.tenant_key("g") == 1000.0, "who ceased to wait in an earlier step has come back"


def test_a_tenant_whose_requests_are_admitted_at_once_saves_nothing_up() -> None:
    queue = FairQueue(TenantService())
    for number in range(50):
        queue.add(waiting(queue, f"f{number}", "f"))
    for number in range(10):
        queue.begin_step(float(number))
        serve(queue, "f", 100)
        queue.add(waiting(queue, f"g{number}", "g"))
        assert queue.service.tenant_key("g") == queue.service.tenant_key("f") == 200.0 * (number + 1)
        queue.let_ahead([f"g{number}"])
        assert queue.pop().request_id == f"g{number}"
        if number % 2:  # the next of g comes before the next step
            queue.add(waiting(queue, f"g{number} too", "g"))
            queue.remove(f"g{number} too")


@given(st.lists(st.tuples(st.sampled_from("fgh"), st.integers(0, 3_000_000)), max_size=60), st.floats(0.0, 5.0))
def test_in_seconds_of_engine_time_no_key_falls_without_a_word(history: list[tuple[str, int]], held: float) -> None:
    queue = FairQueue(TenantService(ServiceUnit(kind=ServiceKind.SECONDS)))
    for number, (tenant, engine_us) in enumerate(history):
        queue.add(waiting(queue, f"{number}", tenant, held=held))
        popped = queue.pop()
        before = queue.service.tenant_key(popped.account.tenant)
        queue.service.charge(popped.request_id, popped.account, Served(engine_us=engine_us))
        assert queue.service.tenant_key(popped.account.tenant) >= before
        queue.add(waiting(queue, f"{number} more", tenant))
        queue.peek()
    queue.service.check()


def forgetful(**limits: int) -> TenantService:
    return TenantService(max_tenants=2, **({"idle_reports": 3} | limits))


def serve_and_answer(service: TenantService, tenant: str, sequence: int, num_output_tokens: int = 10) -> None:
    service.charge("", service.account(tenant, ""), Served(num_output_tokens=num_output_tokens))
    service.take_report(sequence)
    service.answered(sequence)


def test_who_has_been_idle_long_is_forgotten_and_counts_anew_in_a_later_era_when_it_returns() -> None:
    service = forgetful()
    for sequence, tenant in enumerate("fgh"):
        serve_and_answer(service, tenant, sequence)
    lines = service.take_report(3)
    assert lines == {Account("f"): AccountReport(served=NOTHING, era=1)}
    assert service.take_report(5)[Account("f")].served == NOTHING, "said again until it is answered"
    service.answered(5)
    assert Account("f") not in service.take_report(6)
    service.charge("", service.account("f", ""), Served(num_output_tokens=1))
    line = service.take_report(7)[Account("f")]
    assert (line.served.num_output_tokens, line.era > 0) == (1, True)
    service.check()


def test_who_has_requests_or_something_to_be_told_or_was_used_lately_is_not_forgotten() -> None:
    service = forgetful()
    service.arrives(service.account("waits", ""))
    service.hold("r", service.account("runs", ""), 1.0)
    serve_and_answer(service, "idle", 0)
    service.charge("", service.account("told", ""), Served(num_output_tokens=1))
    for sequence in range(1, 9):
        service.take_report(sequence)
    assert {account.tenant for account in service.totals()} == {"waits", "runs", "told"}
    service.release("r")
    service.take_report(9)
    service.answered(9)
    service.take_report(10)
    assert "runs" in {account.tenant for account in service.totals()}, "it ended a moment ago"


def test_a_word_from_before_an_account_was_forgotten_takes_nothing_off_its_new_total() -> None:
    service = forgetful()
    for sequence, tenant in enumerate("fgh"):
        serve_and_answer(service, tenant, sequence, num_output_tokens=500)
    service.take_report(3)
    service.charge("", service.account("f", ""), Served(num_output_tokens=3))
    service.learn(Share(tenant="f", known=Known(counter=2000.0, included=1000.0), weight=1.0, waits=True))
    assert service.tenant_key("f") == 2006.0


@pytest.mark.parametrize("asked", [True, False], ids=["reports are answered", "nobody asks"])
def test_ten_thousand_tenants_pass_through_an_engine_in_bounded_memory(asked: bool) -> None:
    service = TenantService(max_tenants=100, idle_reports=10)
    for number in range(10_000):
        account = service.account(f"t{number}", "u")
        service.arrives(account)
        service.leaves(account)
        service.hold(f"{number}", account, 5.0)
        service.charge(f"{number}", account, Served(num_output_tokens=1))
        service.release(f"{number}")
        if asked and number % 20 == 0:
            service.take_report(number // 20)
            service.answered(number // 20)
        if number % 1000 == 0:
            service.check()
    assert len(service.totals()) <= 100 + 20 * 12
    assert len(service.known()) <= 100 + 20 * 12
