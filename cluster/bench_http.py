"""`python -m cluster bench-http`: our endpoint against plain vLLM's server over HTTP, one replica each, in one run.

Rules:
- Both servers have the same engine arguments and both are up; one is driven at a time, in alternating order, after a
  warm-up of each. Requests are those of a workload with other prompts in every round, streamed and greedy, with as many
  output tokens as it says; all of them are of one tenant. They come when the workload says, as far as `--streams` allows,
  and times count from their sending.
- Ratios are per round (ours / plain), with the median and a 95 % interval over rounds.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from cluster import keys, models
from cluster.bench_command import tell
from cluster.bench_model import number_in
from cluster.config import AppArgs, load
from cluster.prompts import RequestSpec
from cluster.serve import DEFAULT_CONFIG
from cluster.workload import Workload, add_workload_arguments, workload_of
from cluster.workload_summary import Summary
from cost_service.result_file import write_json

START_TIMEOUT_S = 600
TRACE = "synthetic:requests=72,rate=inf,spread=0,prompt_mean=20,output_mean=48"

Round = tuple[tuple[RequestSpec, ...], tuple[RequestSpec, ...]]
"""Requests that are sent one by one, and those that are sent when they arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One measurement of one server."""

    throughput_tokens_per_s: float
    ttft_s_p50: float
    ttft_s_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that answers."""

    name: str
    url: str
    key: str
    process: subprocess.Popen[bytes]
    start_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="Serve config file (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=24, help="concurrent streams at most (default: 24)")
    parser.add_argument("--alone", type=int, default=6, help="requests per round one by one (default: 6)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per server (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    add_workload_arguments(parser, default=TRACE)


def main(options: argparse.Namespace) -> int:
    """Start both servers, measure, end both; 0, or 2 when an option is wrong or one does not start."""
    servers: list[Server] = []
    try:
        workload = workload_of(options, default=TRACE)
        if options.describe:
            dropped = Counter[str]()
            return tell(Summary.of(workload.requests(dropped), dropped), options.json)
        for name in ("streams", "alone", "rounds"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} must be above 0.")
        file = load(options.config)
        folder = models.prepare(file.args.model.source, file.args.state.path, lambda text: print(text, file=sys.stderr))
        rounds = make_rounds(workload, options, folder, file.args.replicas.max_model_len)
        with tempfile.TemporaryDirectory() as scratch:
            servers.append(start_plain(file.args, folder, Path(scratch), port=8131))
            servers.append(start_ours(options.config, Path(scratch), port=8132))
            report = measure(servers, rounds, options.streams, file.args.model.id) | {"workload": workload.as_report()}
    except (OSError, RuntimeError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    finally:
        for server in servers:
            stop(server.process)
    print(table(report))
    if options.json:
        write_json(report, options.json)
    return 0


def make_rounds(workload: Workload, options: argparse.Namespace, folder: Path | None, context: int) -> list[Round]:
    """Requests of the warm-up and of every round; none has a prompt of another, which a prefix cache would know.

    Raises:
        ValueError: The workload is wrong or does not fit the model.
    """
    vocab = number_in(models.read_config(folder), "vocab_size") if folder else workload.source_vocab
    if not vocab:
        raise ValueError(
            "Prompts of a trace need the model's vocabulary: name the model by its folder, not by a hub id."
        )
    seeds = range(workload.seed, workload.seed + 2 * (options.rounds + 1))
    made = [replace(workload, seed=seed).prompted(vocab, context_tokens=context) for seed in seeds]
    return [(alone[: options.alone], full) for alone, full in zip(made[::2], made[1::2], strict=True)]


def start_plain(args: AppArgs, folder: Path | None, scratch: Path, *, port: int) -> Server:
    """Start vLLM's own OpenAI server with the replica's engine arguments, without scheduler and connector of ours."""
    replicas = args.replicas
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
        "--model", str(folder or args.model.source), "--served-model-name", args.model.id,
        "--max-model-len", str(replicas.max_model_len), "--max-num-seqs", str(replicas.max_num_seqs),
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if replicas.kv_cache_bytes:
        command += ["--kv-cache-memory-bytes", str(replicas.kv_cache_bytes)]
    for name, value in replicas.engine_kwargs.items():
        option = "--" + name.replace("_", "-")
        command += [option] if value is True else [option, str(value)]
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(replicas.cpu_threads),
    }
    return _start("plain", command, environment, scratch, port, key="none", model=args.model.id)


def start_ours(config: Path, scratch: Path, *, port: int) -> Server:
    """Start `python -m cluster serve` with one replica."""
    command = [
        sys.executable, "-m", "cluster", "serve", "--config", str(config), "--replicas", "1", "--port", str(port),
        "--dashboard-port", str(port + 1),
    ]  # fmt: skip
    file = load(config)
    keys.load_or_create(file.args.state.path)
    key = keys.bootstrap_key_path(file.args.state.path).read_text().strip()
    return _start("ours", command, dict(os.environ), scratch, port, key=key, model=file.args.model.id)


def _start(
    name: str, command: list[str], environment: dict[str, str], scratch: Path, port: int, *, key: str, model: str
) -> Server:
    print(f"Starting {name} ...", file=sys.stderr, flush=True)
    log = scratch / f"{name}.log"
    started_s = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None or time.monotonic() - started_s > START_TIMEOUT_S:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the {name} server did not start; the end of its log:\n{tail}")
            if _answers(url, key, model):
                break
            time.sleep(0.25)
    except BaseException:
        stop(process)
        raise
    start_s = time.monotonic() - started_s
    print(f"  first answer after {start_s:.1f} s", file=sys.stderr, flush=True)
    return Server(name=name, url=url, key=key, process=process, start_s=start_s)


def _answers(url: str, key: str, model: str) -> bool:
    try:
        answer = httpx.post(
            f"{url}/v1/completions",
            headers={"Authorization": f"Bearer {key}"},
            json={"model": model, "prompt": "Hello", "max_tokens": 1},
            timeout=60,
        )
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server by its own handle, politely first."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(servers: list[Server], rounds: Sequence[Round], streams: int, model: str) -> dict[str, Any]:
    """Drive the servers in alternating order, the first round to warm them up; return figures per round, and ratios."""
    results: list[dict[str, Any]] = []
    for number, (alone, full) in enumerate(rounds):
        result: dict[str, Any] = {}
        for server in servers[::-1] if number % 2 else servers:
            one_by_one = [replace(request, arrival_s=0.0) for request in alone]
            result[server.name] = {
                "alone": asdict(asyncio.run(drive(server, model, one_by_one, streams=1))),
                "streams": asdict(asyncio.run(drive(server, model, full, streams=streams))),
            }
        if number == 0:
            continue  # warm-up
        results.append(result)
        print(f"round {number}/{len(rounds) - 1}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return {
        "definition": "ours / plain per round; ttft in seconds; one replica each, same engine arguments",
        "streams": streams,
        "start_s": {server.name: round(server.start_s, 1) for server in servers},
        "rounds": results,
        "throughput_ratio": summary([ratio(r, "streams", "throughput_tokens_per_s") for r in results]),
        "throughput_ratio_alone": summary([ratio(r, "alone", "throughput_tokens_per_s") for r in results]),
        "added_ttft_ms": summary([added_ms(r, "streams") for r in results]),
        "added_ttft_ms_alone": summary([added_ms(r, "alone") for r in results]),
    }


async def drive(server: Server, model: str, requests: Sequence[RequestSpec], *, streams: int) -> Figures:
    """Send every request when it arrives, or as soon after that as there are fewer than `streams`."""
    waiting = deque(requests)
    ttfts_s: list[float] = []
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:

        async def one_after_another() -> None:
            while waiting:
                request = waiting.popleft()
                await asyncio.sleep(max(0.0, request.arrival_s - (time.perf_counter() - started_s)))
                ttfts_s.append(await _stream_once(client, server.key, model, request))

        started_s = time.perf_counter()
        await asyncio.gather(*(one_after_another() for _ in range(streams)))
        took_s = time.perf_counter() - started_s
    return Figures(
        throughput_tokens_per_s=round(sum(request.output_tokens for request in requests) / took_s, 2),
        ttft_s_p50=round(statistics.median(ttfts_s), 5),
        ttft_s_mean=round(statistics.fmean(ttfts_s), 5),
    )


async def _stream_once(client: httpx.AsyncClient, key: str, model: str, request: RequestSpec) -> float:
    body = {
        "model": model, "prompt": list(request.prompt_token_ids), "max_tokens": request.output_tokens,
        "min_tokens": request.output_tokens, "ignore_eos": True, "temperature": 0, "stream": True,
    }  # fmt: skip
    sent_s, first_s = time.perf_counter(), 0.0
    headers = {"Authorization": f"Bearer {key}"}
    async with client.stream("POST", "/v1/completions", headers=headers, json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code} instead of 200")
        ended = False
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                first_s = first_s or time.perf_counter() - sent_s
                ended = line == "data: [DONE]"
    if not ended:
        raise RuntimeError("a stream ended without [DONE]")
    return first_s


def ratio(result: dict[str, Any], load: str, figure: str) -> float:
    """Ours / plain of one round."""
    return float(result["ours"][load][figure] / result["plain"][load][figure])


def added_ms(result: dict[str, Any], load: str) -> float:
    """Milliseconds that our median time to first token is above plain's in one round."""
    return float(1000 * (result["ours"][load]["ttft_s_p50"] - result["plain"][load]["ttft_s_p50"]))


def summary(values: list[float]) -> dict[str, float]:
    """Median and a 95 % interval of the mean (t, normal approximation from five rounds on)."""
    mean = statistics.fmean(values)
    half = 2.776 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {
        "median": round(statistics.median(values), 4),
        "mean": round(mean, 4),
        "low": round(mean - half, 4),
        "high": round(mean + half, 4),
    }


def table(report: dict[str, Any]) -> str:
    """Render the report for a terminal."""
    lines = [f"{'figure':<28}{'median':>10}{'95 % from':>12}{'to':>10}"]
    for name in ("throughput_ratio", "throughput_ratio_alone", "added_ttft_ms", "added_ttft_ms_alone"):
        s = report[name]
        lines.append(f"{name:<28}{s['median']:>10.3f}{s['low']:>12.3f}{s['high']:>10.3f}")
    return "\n".join(lines)
