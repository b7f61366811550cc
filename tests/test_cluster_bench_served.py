"""Goal: `bench --serve` measures running servers in turns, tells what it found and no key, and keeps what it has.

Method: the command against small HTTP servers that stream as OpenAI's API does; the real application runs in
`tests/test_ray_serve.py`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.bench_served import counted
from cluster.config import HOME_VARIABLE
from cluster.report import page, read_result
from cluster.state import SqliteStore
from cluster.tenant_registry import TenantRegistry
from tests.streaming_server import BROKEN, MODEL, Server, serving

ROOT = Path(__file__).parents[1]
KEYS = {"one": "sk-secret-1", "two": "sk-secret-2"}
OUTPUTS = (9, 7, 11, 8)


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    with serving(*KEYS.values()) as stock, serving(*KEYS.values()) as ours:
        yield stock, ours


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    rows = [f"{0.02 * place},{tuple(KEYS)[place % 2]},{20 + place},{num}" for place, num in enumerate(OUTPUTS)]
    path.write_text("arrival_s,tenant,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(json.dumps(KEYS))
    path.chmod(0o600)
    return path


def command(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster", "bench", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )  # fmt: skip


def both(servers: tuple[Server, Server]) -> str:
    return f"stock={servers[0].url},ours={servers[1].url}/v1"


def test_servers_are_driven_in_turns_and_compared_with_the_one_that_is_stock(
    servers: tuple[Server, Server], trace: Path, keys_file: Path, tmp_path: Path
) -> None:
    file, picture = tmp_path / "result.json", tmp_path / "figures.svg"
    process = command(
        "--serve", both(servers), "--keys", keys_file, "--trace", f"csv:{trace}", "--repeats", 2, "--json", file,
        "--plot", picture, "--save-baseline", tmp_path / "baseline.json",
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "repeat 2/2, ours" in err
    assert "ours / stock" in out
    told = out + err + file.read_text() + picture.read_text() + (tmp_path / "baseline.json").read_text()
    for private in (*KEYS.values(), "127.0.0.1", str(tmp_path), os.uname().nodename):
        assert private not in told
    report = json.loads(file.read_text())
    assert set(report) == {
        "benchmark", "command", "machine", "settings", "calibration", "arms", "interval", "ratio_to_stock"
    }  # fmt: skip
    assert report["settings"]["models"] == [MODEL, MODEL]
    assert list(report["arms"]) == ["stock", "ours"]
    assert report["ratio_to_stock"]["ours"]["throughput_tokens_per_s"]["low"] > 0
    assert page(read_result(file)).count("<svg") == 3
    assert 0 < report["calibration"]["s_per_output_token"] < 1
    for arm in report["arms"].values():
        assert len(arm["repeats"]) == 2
        for one in arm["repeats"]:
            assert (one["requests"], one["unfinished"], one["rejected"], one["failed"]) == (4, 0, 0, 0)
            assert [record["delivered_tokens"] for record in one["records"]] == list(OUTPUTS)
            assert (one["preemptions"], one["swaps"], one["recomputes"]) == (None, None, None)
            assert sorted(one["tenants"]) == sorted(KEYS)
            assert one["weighted_turnaround_mean"] > 0
            assert one["client_cpu_us_per_token"] > 0
    # Beside single requests, which the first server alone has had: a warm-up and two repeats each.
    assert len(servers[1].bodies) == 3 * len(OUTPUTS)
    assert len(servers[0].bodies) > 4 * len(OUTPUTS)
    for server in servers:  # no prompt is sent twice, and every one with its tenant's key
        assert len({tuple(body["prompt"]) for body in server.bodies}) == len(server.bodies)
        for body, user in zip(server.bodies, server.users, strict=True):
            assert user == tuple(KEYS.values())[len(body["prompt"]) % 2]


def test_rejected_requests_are_counted_and_count_up_to_the_runs_end(tmp_path: Path) -> None:
    file, trace = tmp_path / "result.json", tmp_path / "t.csv"
    rows = [f"0,{tenant},9,12" for tenant in ("one", "two") * 3]
    trace.write_text("arrival_s,tenant,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    with serving(*KEYS.values(), most_at_once=2) as server:
        process = command(
            "--serve", server.url, "--key", KEYS["one"], "--trace", f"csv:{trace}", "--repeats", 1, "--json", file
        )  # fmt: skip
        assert process.stderr is not None
        assert any("Warming up" in line for line in process.stderr)  # single requests are behind it
        server.token_s = 0.1
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (one,) = json.loads(file.read_text())["arms"]["running"]["repeats"]
    assert (one["rejected"], one["failed"], one["unfinished"]) == (4, 0, 4)
    assert sum(of["rejected"] for of in one["tenants"].values()) == 4
    assert one["ttft_s_p99"] == pytest.approx(one["run_end_s"], rel=0.01)


def test_a_single_request_that_is_not_served_ends_the_benchmark(servers: tuple[Server, Server], tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(f"arrival_s,tenant,prompt_tokens,output_tokens\n0,one,9,5\n0,one,9,{BROKEN}\n0,one,9,6\n")
    process = command("--serve", servers[0].url, "--key", KEYS["one"], "--trace", f"csv:{trace}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "Error: A request that was alone was not served: see the server's log."


def test_what_was_measured_before_ctrl_c_is_kept_and_gone_on_with(
    servers: tuple[Server, Server], trace: Path, keys_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    arguments = (
        "--serve", both(servers), "--keys", keys_file, "--trace", f"csv:{trace}", "--repeats", 3, "--json", file
    )  # fmt: skip
    process = command(*arguments)
    assert process.stderr is not None
    # The first arm of the second repeat, when it is done: the first repeat is whole then, and the second not.
    ended = next(line for line in process.stderr if "repeat 2/3" in line)
    servers[0].token_s = servers[1].token_s = 1.0
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, ended + err
    assert err.splitlines()[-1] == "Interrupted; 1 whole repeats were measured."
    assert "ours / stock" in out
    report = json.loads(file.read_text())
    assert (report["partial"], report["partial_repeats"]) == (True, 1)
    assert [len(arm["repeats"]) for arm in report["arms"].values()] == [1, 1]
    servers[0].token_s = servers[1].token_s = 0.002
    process = command(*arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "3 of 6 runs were done before" in err
    whole = json.loads(file.read_text())
    assert "partial" not in whole
    assert whole["arms"]["ours"]["repeats"][0] == report["arms"]["ours"]["repeats"][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys", "result.json", "t.csv"]


def test_preemptions_of_a_run_are_counted_while_the_same_engines_live() -> None:
    before = [{"epoch": "a", "swaps": 3, "recomputes": 1}, {"epoch": "b", "swaps": 0, "recomputes": 5}]
    after = [{"epoch": "b", "swaps": 2, "recomputes": 5}, {"epoch": "a", "swaps": 4, "recomputes": 4}]
    assert counted(before, after) == {"swaps": 3, "recomputes": 3}
    assert counted(before, [after[0], {"epoch": "c", "swaps": 0, "recomputes": 0}]) is None
    assert counted([], []) is None


def test_made_tenants_live_as_long_as_the_benchmark(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    registry = TenantRegistry(SqliteStore(tmp_path / "home" / "state.sqlite"), {})
    with serving() as server:
        process = command("--serve", server.url, "--make-tenants", "--trace", f"csv:{trace}", "--repeats", 1)
        assert process.stderr is not None
        made = next(line for line in process.stderr if "Made 2 tenants" in line)
        assert sorted(registry.stored()) == ["bench-0", "bench-1"], made
        assert [len(tenant.live_keys) for tenant in registry.stored().values()] == [1, 1]
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2  # this server has not followed the store
    assert "the key of tenant one is refused" in err
    assert "sk-" not in out + made + err
    assert [len(tenant.live_keys) for tenant in registry.stored().values()] == [0, 0]
