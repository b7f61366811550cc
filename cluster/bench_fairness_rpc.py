"""`python -m cluster bench-fairness-rpc`: how many exchanges a second the fairness actor takes from real callers.

Method: a Ray cluster of its own on this machine with the product's actor and its store; callers in processes of their own
play replicas whose reports change a few accounts each, as fast as the actor answers, each replica with one call in flight.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from cluster.config import StateArgs
from cluster.stores import open_store
from cost_service.charges import Account, Served, ServiceKind
from cost_service.result_file import write_json
from cost_service.service_messages import UNTOLD, AccountReport, FairnessAnswer, FairnessReport, ReplicaLimits

LIMITS = ReplicaLimits(
    num_pool_tokens=100_000, max_num_seqs=64, max_tokens=4096, max_service_per_s=1e4, max_decode_tokens_per_s=1e3
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replicas", type=int, default=64, help="that report (default: 64)")
    parser.add_argument("--tenants", type=int, default=1000, help="that are served (default: 1000)")
    parser.add_argument("--changes", type=int, default=20, help="accounts that a report holds (default: 20)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure for (default: 10)")
    parser.add_argument("--callers", type=int, default=1, help="processes that play replicas (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE (- for standard output)")


def main(options: argparse.Namespace) -> int:
    """Print exchanges per second and how long one takes; 0."""
    import ray

    from global_scheduler.fairness_actor import start_fairness_actor

    shares = [
        options.replicas // options.callers + (n < options.replicas % options.callers) for n in range(options.callers)
    ]
    with tempfile.TemporaryDirectory() as folder:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=max(1, options.callers))
        try:
            actor = start_fairness_actor(open_store(StateArgs(directory=folder)))
            ray.get(actor.status.remote())
            play_remotely = ray.remote(num_cpus=1)(play)
            calls = [
                play_remotely.remote(actor, f"c{n}", share, options.tenants, options.changes, options.seconds)
                for n, share in enumerate(shares)
            ]
            seconds = sorted(one for each in ray.get(calls) for one in each)
            interval_s = ray.get(actor.status.remote())["interval_s"]
        finally:
            ray.shutdown()
    figures = {
        "replicas": options.replicas, "tenants": options.tenants, "changes": options.changes,
        "calls_per_s": len(seconds) / options.seconds, "needed_per_s": options.replicas / interval_s,
        "ms_p50": 1e3 * statistics.median(seconds), "ms_p99": 1e3 * seconds[int(0.99 * len(seconds))],
    }  # fmt: skip
    if options.json is not None:
        write_json(figures, options.json)
    else:
        print(
            f"{figures['calls_per_s']:.0f} exchanges/s of {options.replicas} replicas at once"
            f" (at the actor's interval: {figures['needed_per_s']:.0f}), each {figures['ms_p50']:.1f} ms in the median,"
            f" {figures['ms_p99']:.1f} ms at p99"
        )
    return 0


def play(actor: Any, name: str, num_replicas: int, num_tenants: int, num_changes: int, limit_s: float) -> list[float]:
    """Report for some replicas at once; returns the seconds of every exchange."""
    encoder, answers = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FairnessAnswer)
    seconds: list[float] = []

    async def replica(number: int) -> None:
        life, version, sequence, tokens, first = "", UNTOLD, 0, [0] * num_tenants, number
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            sequence += 1
            accounts = []
            for _ in range(num_changes):
                first = (first + 7919) % num_tenants
                tokens[first] += 10
                line = AccountReport(served=Served(num_output_tokens=tokens[first]), num_waiting=1, num_running=1)
                accounts.append((Account(f"tenant-{first}", "u"), line))
            message = FairnessReport(
                pool="bench", service=ServiceKind.TOKENS, replica=f"{name}-{number}", epoch="e", sequence=sequence,
                accounts=accounts, limits=LIMITS, life=life, version=version,
            )  # fmt: skip
            began_s = time.monotonic()
            answer = answers.decode(await actor.exchange.remote(encoder.encode(message)))
            seconds.append(time.monotonic() - began_s)
            life, version = answer.life, answer.version

    async def all_replicas() -> None:
        await asyncio.gather(*(replica(number) for number in range(num_replicas)))

    asyncio.run(all_replicas())
    return seconds
