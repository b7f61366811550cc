"""Goal: vLLM's scheduler admits in the fair order, uses the memory that there is, and charges what it gives, to the token.

Method: vLLM's own scheduler with ours on top, a runner that stamps tokens (`tests/admission_engine.py`), few KV blocks.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cost_service.charges import SYSTEM, Account, Served, ServiceUnit
from cost_service.service_messages import Known, Share
from replicas.fair_queue import Admission
from replicas.messages import SetShares
from replicas.vllm_memory import tenant_of
from tests.admission_engine import AdmissionEngine
from tests.engine_runs import BLOCK_SIZE
from tests.test_engine_policies import COSTS

SETTINGS: dict[str, Any] = {"guard": False, "cost_snapshot": COSTS.to_json()}


def engine(model: Path, num_blocks: int = 40, **changes: Any) -> AdmissionEngine:
    settings = SETTINGS | {"preemption": "recompute"} | changes.pop("settings", {})
    return AdmissionEngine(model, num_blocks=num_blocks, settings=settings, **changes)


def core(one: AdmissionEngine) -> Any:
    return one.scheduler.admission.core


def test_a_light_tenant_is_next_however_many_requests_another_has_waiting(tiny_model: Path) -> None:
    one = engine(tiny_model)
    for number in range(200):
        one.add(f"f{number}", "flood")
    for _ in range(10):
        one.step()
    one.add("g", "light")
    for _ in range(200):
        if "g" in one.admitted:
            break
        before = len(one.admitted)
        one.step()
    assert one.admitted[before] == "g", "somebody of the flood was admitted before"


def test_first_come_serves_the_flood_first(tiny_model: Path) -> None:
    one = engine(tiny_model, settings={"admission": "first-come"})
    for number in range(60):
        one.add(f"f{number}", "flood")
    one.add("g", "light")
    one.finish()
    first = list(dict.fromkeys(one.admitted))
    assert first == [f"f{number}" for number in range(60)] + ["g"]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)], ids=["equal", "3 to 1"])
@pytest.mark.parametrize("policy", ["recompute", "swap", "adaptive"])
def test_tenants_in_overload_share_by_weight(tiny_model: Path, policy: str, weights: tuple[float, float]) -> None:
    one = engine(tiny_model, settings={"preemption": policy})
    rng = random.Random(5)
    for number in range(600):  # f asks for twice as much as g
        tenant, weight = ("f", weights[0]) if number % 3 else ("g", weights[1])
        one.add(
            str(number), tenant, prompt=rng.randrange(10, 60), output=rng.randrange(10, 60), weight=weight
        )  # fmt: skip
    while len(one.admitted) < 250:
        one.step()
    service = {name: core(one).service.tenant_key(name) for name in ("f", "g")}
    one.scheduler.admission.settle()
    outputs = one.output_tokens()
    share = outputs["f"] / outputs.total()
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.05), outputs
    assert service["f"] == pytest.approx(service["g"], rel=0.1)
    assert not one.num_left_idle


def test_a_flood_of_many_users_is_one_tenant(tiny_model: Path) -> None:
    one = engine(tiny_model)
    for number in range(300):
        one.add(f"f{number}", "f", user=f"user{number % 20}")
        one.add(f"g{number}", "g")
    while len(one.admitted) < 200:
        one.step()
    outputs = one.output_tokens()
    assert outputs["f"] / outputs.total() == pytest.approx(0.5, abs=0.04)
    by_user = [served.num_output_tokens for account, served in core(one).service.totals().items() if account.user]
    assert len(by_user) == 20
    assert max(by_user) - min(by_user) <= 3 * 20


def test_within_a_user_who_waited_long_for_little_goes_first(tiny_model: Path) -> None:
    one = engine(tiny_model, max_num_seqs=1)
    one.add("running", "f", output=30)
    one.step()
    one.add("long", "f", output=200, age_s=5.0)
    one.add("short", "f", output=5, age_s=5.0)
    one.finish()
    assert one.admitted == ["running", "short", "long"]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("caching", [False, True], ids=["no prefix cache", "prefix cache"])
@pytest.mark.parametrize("policy", ["recompute", "swap", "random", "adaptive"])
def test_what_is_charged_is_what_was_delivered_to_the_token(
    tiny_model: Path, policy: str, caching: bool, asynchronous: bool
) -> None:
    one = engine(
        tiny_model, num_blocks=24, settings={"preemption": policy}, asynchronous=asynchronous,
        enable_prefix_caching=caching, max_num_batched_tokens=64,
    )  # fmt: skip
    rng = random.Random(7)
    prefix = tuple(rng.randrange(3, 500) for _ in range(40))
    left = set()
    for number in range(120):
        own = tuple(rng.randrange(3, 500) for _ in range(rng.randrange(1, 60)))
        one.add(
            str(number), f"t{number % 3}", prompt=prefix + own if number % 4 == 0 else own, user=f"u{number % 2}",
            output=rng.randrange(1, 60),
        )  # fmt: skip
        for _ in range(rng.randrange(6)):
            one.step()
        if rng.random() < 0.15:
            name = str(rng.randrange(number + 1))
            one.abort(name)
            left.add(name)
    one.finish()
    one.check_tokens(set(one.requests) - left)
    assert sum(one.scheduler.preemptor.num_preemptions.values()) >= 10
    totals = core(one).service.totals()
    for tenant in ("t0", "t1", "t2"):
        total = Served()
        for account, served in totals.items():
            total = total.plus(served) if account.tenant == tenant else total
        admitted = [name for name in one.cached if one.tenants[name] == tenant]
        assert total.num_output_tokens == one.output_tokens()[tenant]
        assert total.num_cached_tokens == sum(one.cached[name] for name in admitted)
        assert total.num_input_tokens + total.num_cached_tokens == sum(len(one.jobs[name].prompt) for name in admitted)
    assert (totals[Account(SYSTEM)].num_input_tokens > 0) or policy == "swap"
    assert not len(core(one))
    assert not core(one).service._holds, "something is still held"


def test_predicted_outputs_count_in_advance_where_the_settings_say_so_and_nothing_of_them_is_left(
    tiny_model: Path,
) -> None:
    one = engine(tiny_model, num_blocks=24, settings={"predicts_output": True})
    for number in range(12):
        one.add(f"{number}", "t", prompt=20, output=20, predicted=10 if number % 2 else 40)
    one.step()
    service = core(one).service
    totals = service.totals()[Account("t")]
    assert service.tenant_key("t") > ServiceUnit().service(totals)
    one.finish()
    totals = service.totals()[Account("t")]
    assert service.tenant_key("t") == ServiceUnit().service(totals) == 12 * (20 + 2 * 20)


@pytest.mark.parametrize("seed", range(6))
def test_no_memory_is_left_idle_that_somebody_may_use(tiny_model: Path, seed: int) -> None:
    rng = random.Random(seed)
    one = engine(tiny_model, num_blocks=30, settings={"preemption": rng.choice(["recompute", "swap", "adaptive"])})
    for number in range(150):
        big = rng.random() < 0.2
        one.add(
            str(number), rng.choice(["a", "b", "c"]), prompt=rng.randrange(200, 400) if big else rng.randrange(5, 50),
            output=rng.randrange(5, 40),
        )  # fmt: skip
    one.finish()
    assert one.num_left_idle == 0
    one.check_tokens()


def test_a_request_that_does_not_fit_is_passed_within_a_limit_and_then_admitted(tiny_model: Path) -> None:
    one = engine(tiny_model, num_blocks=30)
    one.add("running", "a", prompt=200, output=200)
    one.step()
    one.add("big", "b", prompt=300, output=10)
    for number in range(400):
        one.add(f"s{number}", "c", prompt=40, output=10)
    while "big" not in one.admitted:
        one.step()
    passed = [name for name in one.admitted if name.startswith("s")]
    assert len(passed) > 5, "nobody passed, and memory lay idle"
    assert 40 * len(passed) <= core(one).settings.bypass_tokens


@pytest.mark.parametrize("link", [{}, {"throttled_link_bytes_per_s": 1e8}], ids=["at once", "over a link"])
def test_who_holds_blocks_for_a_load_goes_before_the_fair_order(tiny_model: Path, link: dict[str, Any]) -> None:
    one = engine(tiny_model, num_blocks=24, settings={"preemption": "swap", **link})
    for number in range(80):
        one.add(str(number), f"t{number % 4}", prompt=30, output=60)
    one.finish()
    one.check_tokens()
    assert one.scheduler.num_swapped_in_blocks > 0


def test_the_order_can_be_switched_while_requests_wait(tiny_model: Path) -> None:
    one = engine(tiny_model)
    for number in range(50):
        one.add(f"f{number}", "f")
    for number in range(50):
        one.add(f"g{number}", "g")
    one.step()
    core(one).follow(Admission.FIRST_COME)
    while len(one.admitted) < 40:
        one.step()
    assert not any(name.startswith("g") for name in one.admitted[20:]), one.admitted
    core(one).follow(Admission.FAIR)
    before = len(one.admitted)
    while len(one.admitted) < before + 20:
        one.step()
    assert sum(name.startswith("g") for name in one.admitted[before:]) >= 18, "g has had less until now"
    one.finish()
    one.check_tokens()


def test_what_the_cluster_says_rules_the_order(tiny_model: Path) -> None:
    one = engine(tiny_model, max_num_seqs=1)
    one.add("running", "c", output=30)
    one.step()
    for number in range(20):
        one.add(f"f{number}", "f", prompt=30, output=5)
        one.add(f"g{number}", "g", prompt=30, output=5)
    known = {"f": 5000.0, "g": 100.0, "c": 100.0}
    shares = [
        Share(tenant=name, known=Known(counter=counter, included=0.0), weight=1.0, waits=True)
        for name, counter in known.items()
    ]
    one.scheduler.admission.learn(SetShares(shares=shares, answered=0))
    one.finish()
    assert [name[0] for name in one.admitted[1:]] == ["g"] * 20 + ["f"] * 20


def test_reports_are_repeated_until_they_are_answered(tiny_model: Path) -> None:
    one = engine(tiny_model)
    one.add("0", "f", user="u", output=5)
    one.finish()
    admission = one.scheduler.admission
    first, second = admission.report("e"), admission.report("e")
    assert (first.sequence, second.sequence) == (1, 2)
    assert dict(second.accounts)[Account("f", "u")].served.num_output_tokens == 5
    admission.learn(SetShares(shares=[], answered=2))
    assert admission.report("e") is None
    admission.learn(SetShares(shares=[], answered=2, wants_everything=True))
    everything = admission.report("e")
    assert dict(everything.accounts)[Account("f", "u")].served.num_output_tokens == 5
    assert everything.known == {"f": 40 + 2 * 5}


def test_routers_are_told_the_tokens_of_those_who_wait_by_tenant(tiny_model: Path) -> None:
    one = engine(tiny_model)
    for number in range(60):
        one.add(f"f{number}", "f")
    for number in range(3):
        one.add(f"g{number}", "g")
    while one.scheduler.has_unfinished_requests():
        waiting = [*one.scheduler.waiting, *one.scheduler.skipped_waiting]
        backlog = Counter[str]()
        for request in waiting:
            backlog[tenant_of(request)] += request.num_prompt_tokens
        totals = one.scheduler.totals()
        assert totals.backlog == backlog
        assert totals.num_waiting_tokens == backlog.total()
        assert (totals.queued_s > 0.0) == bool(waiting), "work waits where somebody does"
        one.step()
    assert one.scheduler.totals().backlog == {}
    assert one.scheduler.totals().autoscaling(0.0).num_waiting == 0


def test_requests_with_priorities_keep_vllms_queues(tiny_model: Path) -> None:
    one = engine(tiny_model, scheduling_policy="priority")
    assert one.scheduler.admission is None
    for number in range(20):
        one.add(str(number), "f")
    waiting_tokens = sum(request.num_prompt_tokens for request in one.scheduler.waiting)
    assert one.scheduler.totals().num_waiting_tokens == waiting_tokens > 0
    one.finish()
    one.check_tokens()


def test_a_victim_comes_back_by_its_arrival_and_not_ahead_of_a_less_served_tenant(tiny_model: Path) -> None:
    one = engine(tiny_model, num_blocks=1 + 2 * (100 // BLOCK_SIZE))
    one.add("f0", "f", prompt=60, output=100)
    one.add("f1", "f", prompt=60, output=100)
    one.step()
    one.add("g", "g", prompt=20, output=10)
    one.finish()
    one.check_tokens()
    assert one.admitted.index("g") < max(i for i, name in enumerate(one.admitted) if name == "f1")


def test_whoever_gives_way_is_charged_what_it_has_had_also_where_the_order_is_first_come(tiny_model: Path) -> None:
    one = engine(tiny_model, num_blocks=1 + 2 * (100 // BLOCK_SIZE), settings={"admission": "first-come"})
    for name in ("f0", "f1"):
        one.add(name, "f", prompt=60, output=100)
    num_victims = 0
    for _ in range(200):
        one.step()
        for request in one.scheduler.waiting:
            num_victims += request.num_output_tokens > 0
            assert core(one)._requests[request.request_id].num_output_tokens == request.num_output_tokens
    assert num_victims, "nobody gave way"
    one.finish()
    one.check_tokens()


def test_a_report_says_how_much_longer_requests_took_than_alone(tiny_model: Path) -> None:
    one = engine(tiny_model)
    for number in range(30):
        one.add(f"f{number}", "f", prompt=40, output=20)
    one.add("g", "g", prompt=40, output=20, age_s=1000.0)
    one.add("aborted", "h")
    one.step()
    one.abort("aborted")
    one.finish()
    ended = one.scheduler.admission.report("e").ended
    assert set(ended) == {"f", "g"}, "a client that left had no answer"
    assert (ended["f"].num, ended["g"].num) == (30, 1)
    assert ended["f"].weighted_turnaround > 0.0
    assert ended["g"].weighted_turnaround > 1000.0, "the time before its arrival here counts"


def test_totals_say_what_all_tenants_were_given_and_what_the_engine_holds(tiny_model: Path) -> None:
    one = engine(tiny_model, num_blocks=40)
    one.add("f", "f", prompt=40, output=20)
    one.add("g", None, prompt=30, output=10)
    one.finish()
    one.scheduler.admission.settle()
    totals = one.scheduler.totals()
    assert (totals.admission, totals.service_kind) == ("fair", "tokens")
    assert totals.service == 40 + 2 * 20 + 30 + 2 * 10
    assert totals.num_pool_tokens == totals.num_kv_blocks * BLOCK_SIZE
