"""Goal: `bench-replicas` places requests as it says, tells shares from service alone, and its engines are fair together.

Method: wrong options, placement and shares as values; the command itself with two real engines and the real actor.
"""

import argparse
import json
from pathlib import Path

import pytest

from cluster import bench_replicas
from cluster.bench_replicas import arms_of, parse_pins, place
from cluster.prompts import RequestSpec
from cluster.records import RequestRecord
from cluster.service_curve import shares_while_all_wait


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_replicas.add_arguments(parser)
    return parser.parse_args(arguments)


def request(name: str, tenant: str, arrival_s: float) -> RequestSpec:
    return RequestSpec(
        request_id=name, tenant=tenant, arrival_s=arrival_s, prompt_token_ids=(1, 2), output_tokens=2
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--pin", "g"], "--pin 'g' must be TENANT=I,J with replicas from 0 to 1"),
        (["--pin", "g=0,2"], "--pin 'g=0,2' must be TENANT=I,J"),
        (["--pin", "=0"], "--pin '=0' must be TENANT=I,J"),
        (["--pin", "stranger=0"], "--pin names 'stranger', of whom there is no request"),
        (["--policy", "stick"], "--policy has no 'stick'"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_replicas.main(options(*arguments)) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_a_tenants_requests_go_to_its_replicas_in_turns() -> None:
    requests = [request(f"{tenant}{number}", tenant, float(number)) for number in range(4) for tenant in "fg"]
    parts = place(requests, 2, parse_pins(["g=1"], 2))
    assert [[one.request_id for one in part] for part in parts] == [
        ["f0", "f2"], ["g0", "f1", "g1", "g2", "f3", "g3"]
    ]  # fmt: skip


def test_fair_arms_are_joined_and_vllms_own_is_not(tmp_path: Path) -> None:
    from cluster import bench

    given = options("--trace", "synthetic:requests=12,rate=inf,tenants=2")
    arms = arms_of(bench.plan_of(given, tmp_path), 9, num_replicas=2, also_alone=True)
    assert {name: (arm.settings.policy, arm.settings.admission, arm.joined) for name, arm in arms.items()} == {
        "first-come/stock": ("stock", "first-come", False),
        "first-come/adaptive": ("adaptive", "first-come", False),
        "fair/stock": ("stock", "fair", True),
        "fair/stock alone": ("stock", "fair", False),
        "fair/adaptive": ("adaptive", "fair", True),
        "fair/adaptive alone": ("adaptive", "fair", False),
    }
    assert {arm.settings.num_kv_blocks for arm in arms.values()} == {9}
    assert sum(2 * arm.settings.memory_share for arm in arms.values()) == pytest.approx(1.0)  # all live on one GPU


def record(tenant: str, first_s: float | None, finish_s: float | None, num: int) -> RequestRecord:
    return RequestRecord(
        request_id=f"{tenant}{first_s}", tenant=tenant, arrival_s=0.0, first_token_s=first_s, finish_s=finish_s,
        prompt_tokens=0, output_tokens=num or 9, delivered_tokens=num,
    )  # fmt: skip


def test_shares_count_the_time_in_which_everybody_waits_everywhere() -> None:
    # f has replica 1 for itself and waits to the end; g has replica 0, where f waits too, until second 80.
    replica_0 = [record("g", 0.0, 100.0, 100), record("g", 80.0, 100.0, 20), record("f", None, None, 0)]
    replica_1 = [record("f", 0.0, 100.0, 300), record("f", None, None, 0)]
    assert shares_while_all_wait([replica_0, replica_1]) == pytest.approx({"f": 0.75, "g": 0.25})
    assert shares_while_all_wait([replica_0, replica_1], {"f": 3.0}) == pytest.approx({"f": 0.5, "g": 0.5})


def test_who_never_waits_leaves_no_time_to_count() -> None:
    assert shares_while_all_wait([[record("f", 0.0, 9.0, 9)], [record("g", 0.0, 9.0, 9)]]) == {}


@pytest.mark.engine
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tenant_on_one_of_two_replicas_has_half_with_the_actor_and_a_quarter_without(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    given = options(
        "--policy", "adaptive", "--admission", "fair", "--also-alone", "--repeats", "1", "--limit-s", "40", "--pin", "g=0",
        "--json", str(file),
    )  # fmt: skip
    assert bench_replicas.main(given) == 0
    shares = {name: arm["repeats"][0]["shares"] for name, arm in json.loads(file.read_text())["arms"].items()}
    assert shares["adaptive"]["f"] == pytest.approx(0.50, abs=0.03)
    assert shares["adaptive alone"]["f"] == pytest.approx(0.75, abs=0.05)
