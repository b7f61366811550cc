"""Goal: an engine's own word of who has had what is right while requests come, go, come back, and while time is the unit.

Method: queues over one `TenantService`, as an engine has two; random histories in seconds.
"""

from hypothesis import given
from hypothesis import strategies as st

from cost_service.charges import Served, ServiceKind, ServiceUnit
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
