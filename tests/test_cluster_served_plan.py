"""Goal: `bench --serve` knows from its options alone which clusters are driven, and what they are told to follow."""

import argparse
from pathlib import Path

import pytest

from cluster import bench
from cluster.served_client import Endpoint
from cluster.served_plan import ServedArm, arms_of, base_url, plan_of
from cluster.workload import Workload

URL = "http://127.0.0.1:8000"


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_one_url_is_one_arm_as_it_runs() -> None:
    assert arms_of(options("--serve", URL)) == {"running": ServedArm(url=URL)}


def test_one_url_is_switched_between_all_pairs_that_are_named() -> None:
    given = ["--serve", URL + "/v1"]
    assert arms_of(options(*given, "--policy", "recompute,adaptive")) == {
        name: ServedArm(url=URL, preemption=name) for name in ("recompute", "adaptive")
    }
    assert arms_of(options(*given, "--admission", "first-come,fair")) == {
        name: ServedArm(url=URL, admission=name) for name in ("first-come", "fair")
    }
    both = arms_of(options(*given, "--policy", "swap,adaptive", "--admission", "first-come,fair"))
    assert list(both) == ["first-come/swap", "first-come/adaptive", "fair/swap", "fair/adaptive"]
    assert both["fair/swap"] == ServedArm(url=URL, preemption="swap", admission="fair")
    one = arms_of(options(*given, "--policy", "swap", "--admission", "fair"))
    assert one == {"swap": ServedArm(url=URL, preemption="swap", admission="fair")}


def test_several_urls_are_an_arm_each_in_their_order() -> None:
    named = arms_of(options("--serve", f"stock={URL}/v1/,ours=https://gpu.example:9000/second"))
    assert named == {"stock": ServedArm(url=URL), "ours": ServedArm(url="https://gpu.example:9000/second")}
    assert list(arms_of(options("--serve", f"one={URL}"))) == ["one"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:8000",
        "ftp://a",
        "http://",
        "http://a:b",
        "http://a:99999",
        "http://u:secret@a",
        "http://a?k=secret",
    ],
)
def test_what_is_no_servers_url_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="must be the URL of a server") as error:
        base_url(text)
    assert "secret" not in str(error.value)


KEY = ["--key", "sk-secret"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--serve needs one of --make-tenants, --keys FILE and --key KEY"),
        ([*KEY, "--make-tenants"], "--serve needs one of --make-tenants, --keys FILE and --key KEY"),
        (["--key", "sk secret"], "--key must be an API key, without blanks"),
        (
            [*KEY, "--policy", "stock,adaptive"],
            "The arm stock needs engines of its own: serve it beside, and use --serve",
        ),
        ([*KEY, "--policy", "swop"], "--policy has no 'swop' for --serve"),
        ([*KEY, "--policy", "swap,swap"], "--policy names an arm twice"),
        ([*KEY, "--admission", "fare"], "--admission has no 'fare' for --serve"),
        ([*KEY, "--serve", f"a={URL},b={URL}", "--policy", "swap"], "--policy and --admission switch one cluster"),
        ([*KEY, "--serve", f"a={URL},a={URL}"], "--serve names a cluster twice"),
        ([*KEY, "--serve", f"a={URL},"], "--serve has a cluster named ''"),
        ([*KEY, "--serve", "a=nowhere"], "--serve must be the URL of a server"),
        ([*KEY, "--serve", "nowhere"], "--serve must be the URL of a server"),
        ([*KEY, "--max-num-seqs", "8"], "--max-num-seqs is for engines that the benchmark starts"),
        ([*KEY, "--check-exact"], "--check-exact is for engines that the benchmark starts"),
        ([*KEY, "--threads", "2"], "--threads is for engines that the benchmark starts"),
        ([*KEY, "--repeats", "0"], "--repeats must be above 0"),
        ([*KEY, "--limit-s", "inf"], "--limit-s must be above 0 and finite"),
        ([*KEY, "--trace", "nosuch:x"], "--trace 'nosuch:x' must be SOURCE:PATH"),
        ([*KEY, "--plot", "/nowhere/at/all.png"], "--plot must name a .png or .svg file"),
        (["--keys", "/nowhere/at/all"], "/nowhere/at/all cannot be used"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    served = [] if "--serve" in arguments else ["--serve", URL]
    assert bench.main(options(*served, *arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("Error: ")
    assert message in printed.err
    assert "secret" not in printed.err


@pytest.mark.parametrize("arguments", [KEY, ["--keys", "file"], ["--make-tenants"], ["--address", "auto"]])
def test_what_is_said_of_running_clusters_needs_one(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(options(*arguments)) == 2
    assert f"{arguments[0]} goes with --serve" in capsys.readouterr().err


def test_a_plan_fits_the_shortest_context_and_names_neither_host_nor_key(tmp_path: Path) -> None:
    given = options("--serve", f"stock={URL},ours={URL}/ours", *KEY, "--limit-s", "9")
    arms = arms_of(given)
    endpoints = {
        URL: Endpoint(url=URL, model="m", context_tokens=None),
        f"{URL}/ours": Endpoint(url=f"{URL}/ours", model="n", context_tokens=100),
    }
    fitting = Workload(trace="synthetic:requests=5,tenants=2,prompt_mean=20,output_mean=9,spread=0")
    plan = plan_of(given, arms, fitting, [1, 2, 1], endpoints)
    assert [len(workload) for workload in plan.workloads] == [5, 5, 5]
    assert plan.workloads[0] == plan.workloads[2] != plan.workloads[1]
    assert plan.stock_arm == "stock"
    said = str(plan.as_report())
    assert "127.0.0.1" not in said
    assert "secret" not in str(plan.identity())
    assert URL in str(plan.identity())
    with pytest.raises(ValueError, match="the model's context 100"):
        plan_of(
            given, arms, Workload(trace="synthetic:requests=5,prompt_mean=200,prompt_max=200,spread=0"), [1], endpoints
        )
