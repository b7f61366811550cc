"""Goal: `bench-http` sends the requests of its workload, when and as many at once as it says, and counts what came back.

Method: the driver against a small HTTP server that streams as OpenAI's API does; no engine.
"""

import argparse
import asyncio
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import bench_http
from cluster.bench_http import Server, drive, make_rounds
from cluster.prompts import RequestSpec
from cluster.workload import Workload


@dataclass
class Seen:
    """What the server has seen."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    most_at_once: int = 0
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def server() -> Iterator[tuple[Server, Seen]]:
    seen = Seen()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.lock:
                seen.bodies.append(body)
                seen.times_s.append(time.perf_counter())
                seen.now += 1
                seen.most_at_once = max(seen.most_at_once, seen.now)
            self.send_response(500 if body["max_tokens"] == 13 else 200)
            self.end_headers()
            self.wfile.write(b'data: {"choices": []}\n\n')
            time.sleep(0.02)
            with seen.lock:
                seen.now -= 1
            if body["max_tokens"] != 14:
                self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        process = subprocess.Popen(["true"])
        yield Server(
            name="ours", url=f"http://127.0.0.1:{http.server_port}", key="k", process=process, start_s=0.0
        ), seen  # fmt: skip
        process.wait()
        http.shutdown()
        thread.join()


def requests(num: int, *, apart_s: float = 0.0, output_tokens: int = 5) -> list[RequestSpec]:
    return [
        RequestSpec(
            request_id=f"r{number}", tenant="a", arrival_s=number * apart_s, prompt_token_ids=(7, number),
            output_tokens=output_tokens,
        )
        for number in range(num)
    ]  # fmt: skip


def test_every_request_is_sent_once_with_its_prompt_and_length(server: tuple[Server, Seen]) -> None:
    made = asyncio.run(drive(server[0], "model", requests(9), streams=3))
    bodies = server[1].bodies
    assert sorted(body["prompt"] for body in bodies) == [[7, number] for number in range(9)]
    assert {(body["max_tokens"], body["min_tokens"], body["ignore_eos"]) for body in bodies} == {(5, 5, True)}
    assert server[1].most_at_once <= 3
    assert made.throughput_tokens_per_s > 0
    assert made.ttft_s_p50 > 0


def test_no_request_is_sent_before_it_arrives(server: tuple[Server, Seen]) -> None:
    began_s = time.perf_counter()
    asyncio.run(drive(server[0], "model", requests(5, apart_s=0.03), streams=5))
    assert all(at_s - began_s >= number * 0.03 for number, at_s in enumerate(sorted(server[1].times_s)))


@pytest.mark.parametrize(("output_tokens", "message"), [(13, "status 500"), (14, "ended without")])
def test_an_answer_that_fails_or_is_cut_off_is_no_measurement(
    server: tuple[Server, Seen], output_tokens: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        asyncio.run(drive(server[0], "model", requests(1, output_tokens=output_tokens), streams=1))


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_http.add_arguments(parser)
    return parser.parse_args(arguments)


def test_no_two_loads_have_a_prompt_in_common(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 600}')
    rounds = make_rounds(
        Workload(trace="synthetic:requests=9"), options("--rounds", "3", "--alone", "4"), tmp_path, 2048
    )
    assert [(len(alone), len(full)) for alone, full in rounds] == [(4, 9)] * 4
    prompts = [one.prompt_token_ids for alone, full in rounds for one in (*alone, *full)]
    assert len(set(prompts)) == len(prompts)


def test_a_model_of_unknown_vocabulary_needs_a_source_with_token_ids(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,tenant,prompt_tokens,output_tokens\n0,a,1,1\n")
    with pytest.raises(ValueError, match="name the model by its folder"):
        make_rounds(Workload(trace=f"csv:{tmp_path}"), options(), None, 2048)
    assert len(make_rounds(Workload(trace="synthetic:"), options(), None, 2048)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "nosuch:x"], "--trace 'nosuch:x' must be SOURCE:PATH"),
        (["--streams", "0"], "--streams must be above 0"),
        (["--describe", "--window", "5:6"], "No request is left"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_starts_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_http.main(options(*arguments)) == 2
    assert message in capsys.readouterr().err
