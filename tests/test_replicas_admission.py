"""Goal: tenants are charged what their requests were given, in advance where that is asked for, and are given back the rest.

Method: the object that engine and simulator drive, driven by hand; vLLM's scheduler drives it in
`test_replicas_vllm_admission.py`.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_service.charges import NOTHING, SYSTEM, Account, Served, ServiceKind, ServiceUnit
from replicas.admission import AdmissionSettings, RequestAdmission
from replicas.bypass import Need, Room
from replicas.fair_queue import Admission
from replicas.preemption import Action, PreemptionDecision
from replicas.preemption_cost import Prices

SECONDS = ServiceUnit(kind=ServiceKind.SECONDS)


def admission_of(*, predicts_output: bool = True, unit: ServiceUnit | None = None) -> RequestAdmission:
    settings = AdmissionSettings(predicts_output=predicts_output, unit=unit or ServiceUnit())
    return RequestAdmission(Admission.FAIR, settings)


def add(one: RequestAdmission, name: str, tenant: str = "f", *, predicted: int = 100, prompt_s: float = 0.0) -> None:
    one.add(
        name, tenant=tenant, arrival_s=0.0, service_s=1.0, num_prompt_tokens=10, num_output_tokens=predicted,
        prompt_s=prompt_s,
    )  # fmt: skip


def admit(one: RequestAdmission, name: str, *, engine_us: int = 0) -> None:
    assert one.waiting.pop().request_id == name
    one.admitted(name, num_computed_tokens=10, num_cached_tokens=0, engine_us=engine_us)


def test_what_waits_takes_its_prompts_one_after_another_and_its_outputs_together() -> None:
    one = admission_of()
    assert one.queued_s(8) == 0.0
    add(one, "a", prompt_s=0.25)
    add(one, "b", "g", prompt_s=0.25)
    assert one.queued_s(1) == 2.0, "each is a second long"
    assert one.queued_s(4) == 0.5 + 1.5 / 4
    assert one.queued_s(0) == one.queued_s(1), "nobody runs yet"
    admit(one, "a")
    assert one.queued_s(1) == 1.0
    one.put_back("a", one.skipped)
    assert one.queued_s(1) == 2.0, "both queues wait"
    one.skipped.remove("a")
    one.waiting.remove("b")
    assert one.queued_s(1) == 0.0
    one.check()


@pytest.mark.parametrize("predicts_output", [True, False])
def test_a_running_requests_predicted_output_counts_in_advance_if_asked_for(predicts_output: bool) -> None:
    one = admission_of(predicts_output=predicts_output)
    add(one, "a")
    admit(one, "a")
    assert one.service.tenant_key("f") == 10.0 + (200.0 if predicts_output else 0.0)
    assert list(one.service.totals().values()) == [Served(num_input_tokens=10)], "what counts in advance is not service"


def test_output_uses_up_what_was_predicted_and_what_is_beyond_is_charged_as_it_comes() -> None:
    one = admission_of()
    add(one, "a")
    admit(one, "a")
    for num_tokens, key in ((40, 210.0), (100, 210.0), (130, 270.0)):
        one.delivered("a", num_tokens)
        assert one.service.tenant_key("f") == key


def test_what_was_predicted_too_much_is_given_back_when_the_request_ends() -> None:
    one = admission_of()
    add(one, "a")
    admit(one, "a")
    one.delivered("a", 30)
    one.ended("a")
    assert one.service.tenant_key("f") == 10.0 + 60.0
    one.check()


def test_who_gives_way_is_given_back_the_rest_and_is_held_to_it_again_when_it_comes_back() -> None:
    one = admission_of()
    add(one, "a")
    admit(one, "a")
    one.delivered("a", 30)
    one.put_back("a", one.waiting, front=True)
    assert one.service.tenant_key("f") == 70.0
    admit(one, "a")
    assert one.service.tenant_key("f") == 70.0 + 140.0
    one.put_back("a", one.skipped)
    assert one.service.tenant_key("f") == 70.0, "what is computed again is the system's"


def test_who_is_predicted_much_lets_others_go_first_before_a_token_has_come() -> None:
    one = admission_of()
    for number in range(2):
        add(one, f"f{number}", "f", predicted=500)
    for number in range(3):
        add(one, f"g{number}", "g", predicted=10)
    order = [one.waiting.pop().request_id for _ in range(5)]
    assert order == ["f0", "g0", "g1", "g2", "f1"]


def test_in_seconds_too_one_tenant_does_not_fill_a_steps_batch() -> None:
    one = admission_of(predicts_output=False, unit=SECONDS)
    for tenant in "ffgg":
        add(one, f"{tenant}{len(one)}", tenant, prompt_s=0.5)
    assert [one.waiting.pop().account.tenant for _ in range(4)] == ["f", "g", "f", "g"]


def test_in_seconds_outputs_are_predicted_by_what_tokens_have_taken_as_of_late() -> None:
    one = admission_of(unit=SECONDS)
    add(one, "a", predicted=100)
    admit(one, "a", engine_us=2000)
    one.delivered("a", 10, token_us=1000.0)
    assert one.service.tenant_key("f") == pytest.approx(0.012)
    add(one, "b", predicted=100)
    admit(one, "b", engine_us=2000)
    assert one.service.tenant_key("f") == pytest.approx(0.014 + 0.1, abs=1e-5)


@pytest.mark.parametrize(("action", "engine_us"), [(Action.SWAP, 3000), (Action.RECOMPUTE, 0)])
def test_a_swap_is_the_systems_and_a_recomputation_is_when_it_happens(action: Action, engine_us: int) -> None:
    one = admission_of(unit=SECONDS)
    add(one, "a", prompt_s=0.5)
    admit(one, "a", engine_us=2000)
    prices = Prices(recompute_s=0.001, swap_s=0.003, terms_s={})
    one.gave_way(PreemptionDecision(request_id="a", action=action, num_blocks=1, prices=prices, reason=""))
    one.put_back("a", one.waiting, front=True)
    assert one.service.totals().get(Account(SYSTEM), NOTHING) == Served(engine_us=engine_us)
    assert one.service.tenant_key("f") == pytest.approx(0.002), "its tenant pays for what it was given"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 80), st.booleans()), max_size=30))
def test_whatever_comes_of_predictions_the_key_at_the_end_is_the_service_given(
    history: list[tuple[str, int, bool]],
) -> None:
    one, delivered = admission_of(), {"a": 0, "b": 0}
    for name in "ab":
        add(one, name, predicted=40)
        admit(one, name)
    for name, num_tokens, gives_way in history:
        delivered[name] += num_tokens
        one.delivered(name, delivered[name])
        if gives_way:
            one.put_back(name, one.waiting)
            admit(one, name)
        one.check()
    for name in "ab":
        one.ended(name)
    own = [served for account, served in one.service.totals().items() if account.tenant == "f"]
    assert own == [Served(num_input_tokens=20, num_output_tokens=sum(delivered.values()))]
    assert one.service.tenant_key("f") == 20.0 + 2.0 * sum(delivered.values())


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9)), max_size=12), st.booleans())
def test_many_are_charged_at_once_what_each_would_be(more: list[tuple[str, int]], predicts_output: bool) -> None:
    one, other = (admission_of(predicts_output=predicts_output) for _ in range(2))
    for each in (one, other):
        for name in "abcd":
            add(each, name, "f" if name < "c" else "g", predicted=20)
        for _ in "abcd":
            name = each.waiting.pop().request_id
            each.admitted(name, num_computed_tokens=10, num_cached_tokens=0)
    totals = dict.fromkeys("abcd", 0)
    for name, num in more:
        totals[name] += num
        one.delivered_to(totals.items(), token_us=2.0)
        for single, num_tokens in totals.items():
            other.delivered(single, num_tokens, token_us=2.0)
        assert one.service.totals() == other.service.totals()
        assert [one.service.tenant_key(name) for name in "fg"] == [other.service.tenant_key(name) for name in "fg"]
    one.check()


def room_of(num_free_blocks: int) -> Room:
    return Room(num_free_blocks=num_free_blocks, num_batch_tokens=100, num_seqs=100)


@pytest.mark.parametrize(("num_free_blocks", "num_asked"), [(0, 0), (1, 3), (5, 1)])
def test_without_a_free_block_nobody_is_asked_what_it_needs(num_free_blocks: int, num_asked: int) -> None:
    one = admission_of()
    for name in ("a", "b"):
        add(one, name)
    one.begin_step(1.0)
    asked: list[str] = []

    def need(request_id: str) -> Need:
        asked.append(request_id)
        return Need(request_id=request_id, num_blocks=4, num_tokens=10)

    for _ in range(2):
        assert one.select(lambda: room_of(num_free_blocks), need, lambda _: False) is one.waiting
        assert one.waiting.peek().request_id == "a"
    assert len(asked) == num_asked * (2 if num_free_blocks == 5 else 1)
    one.check()


def test_behind_one_that_was_passed_enough_nobody_is_asked_what_it_needs() -> None:
    one = RequestAdmission(Admission.FAIR, AdmissionSettings(bypass_tokens=10))
    for name in ("large", "small", "next"):
        add(one, name)
    asked: list[str] = []

    def need(request_id: str) -> Need:
        asked.append(request_id)
        return Need(request_id=request_id, num_blocks=9 if request_id == "large" else 1, num_tokens=10)

    for gone, num_asked in ((["small"], 4), ([], 1)):
        asked.clear()
        one.begin_step(1.0)
        assert one.select(lambda: room_of(4), need, lambda _: False) is one.waiting
        if gone:
            assert one.waiting.pop().request_id == "small"
        one.end_step(gone.__contains__)
        assert len(asked) == num_asked
    assert one.bypass.is_spent("large")
    assert one.waiting.peek().request_id == "large"
