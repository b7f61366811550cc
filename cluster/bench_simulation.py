"""`python -m cluster bench-simulation`: how many requests a second the simulator serves on one core, checks off.

Method: chat-like requests (log-normal lengths, Poisson arrivals) on H100 replicas with ample memory, and with so little of
it that requests are preempted; processor time of the run alone.
"""

import argparse
import math
import random
import sys
import time
from dataclasses import replace

from cluster import simulate
from cluster.bench_arm import STOCK
from cluster.simulated_kind import kind_of, timed
from cluster.simulated_replica import ReplicaKind
from cost_service.traces import TraceRequest
from replicas.config import PreemptionPolicy

PROMPT_MEAN, OUTPUT_MEAN, SPREAD = 512.0, 256.0, 1.0
LONGEST = 4096
RATE = 16.0
"""Requests per second and replica."""

PRESSED_BLOCKS = 1800
"""KV blocks with which a replica preempts about one request of five."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--requests", type=int, default=20000, help="requests of a run (default: 20000)")
    parser.add_argument("--replicas", type=int, default=64, help="replicas (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: 0)")


def main(options: argparse.Namespace) -> int:
    """Measure; 0, 2 for a wrong option, 130 when interrupted."""
    if options.requests < 1 or options.replicas < 1:
        print("Error: --requests and --replicas must be at least 1.", file=sys.stderr)
        return 2
    requests = chat(options.requests, rate=RATE * options.replicas, seed=options.seed)
    given = argparse.ArgumentParser()
    simulate.add_arguments(given)
    arguments = given.parse_args(["--replicas", str(options.replicas)])
    print(f"{'':<22}{'requests/s':>12}{'preemptions':>12}")
    try:
        for policy in (STOCK, PreemptionPolicy.RECOMPUTE, PreemptionPolicy.SWAP, PreemptionPolicy.ADAPTIVE):
            kind = kind_of(arguments, timed(arguments), policy=policy)
            for name, one in (("ample", kind), ("pressed", pressed(kind))):
                start_s = time.process_time()
                outcome = simulate.run(arguments, one, requests, f"{policy}, {name}")
                seconds = time.process_time() - start_s
                num_preemptions = sum(record.swaps + record.recomputes for record in outcome.records)
                print(f"{f'{policy}, {name}':<22}{len(requests) / seconds:>12.0f}{num_preemptions:>12}", flush=True)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def chat(num: int, *, rate: float, seed: int) -> list[TraceRequest]:
    """Requests of log-normal lengths that arrive by themselves; a fifth of the tenants send half of them."""
    rng = random.Random(seed)
    at_s, requests = 0.0, []
    for _ in range(num):
        at_s += rng.expovariate(rate)
        prompt, output = (
            min(LONGEST, max(1, round(rng.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))))
            for mean in (PROMPT_MEAN, OUTPUT_MEAN)
        )
        tenant = f"tenant-{rng.randrange(4) if rng.random() < 0.5 else rng.randrange(20)}"
        requests.append(TraceRequest(arrival_s=at_s, tenant=tenant, prompt_tokens=prompt, output_tokens=output))
    return requests


def pressed(kind: ReplicaKind) -> ReplicaKind:
    """The same replicas with little memory."""
    return replace(kind, settings=replace(kind.settings, num_blocks=PRESSED_BLOCKS))
