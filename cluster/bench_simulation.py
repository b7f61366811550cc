"""`python -m cluster bench-simulation`: how many requests a second the simulator serves on one core, checks off.

Method: chat-like requests (log-normal lengths, Poisson arrivals) on H100 replicas with ample memory, and with so little of
it that requests are preempted; processor time of the run alone. Nothing is checked, nor is the bound of a fair order. Peak
memory is the process's so far: for that of one arm name it alone.
"""

import argparse
import math
import random
import resource
import sys
import time
from dataclasses import replace

from cluster import simulate
from cluster.bench_arm import STOCK
from cluster.simulated_kind import kind_of, timed
from cluster.simulated_replica import ADMISSIONS, FIRST_COME, ReplicaKind
from cost_service.traces import TraceRequest
from replicas.config import PreemptionPolicy

PROMPT_MEAN, OUTPUT_MEAN, SPREAD = 512.0, 256.0, 1.0
LONGEST = 4096
RATE = 16.0
"""Requests per second and replica."""

PRESSED_BLOCKS = 1800
"""KV blocks with which a replica preempts about one request of five."""


POLICIES = (STOCK, PreemptionPolicy.RECOMPUTE, PreemptionPolicy.SWAP, PreemptionPolicy.ADAPTIVE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--requests", type=int, default=20000, help="requests of a run (default: 20000)")
    parser.add_argument("--replicas", type=int, default=64, help="replicas (default: 64)")
    parser.add_argument("--tenants", type=int, default=20, help="tenants; a fifth of them send half (default: 20)")
    parser.add_argument("--policy", default=",".join(POLICIES), metavar="A,B", help="of those of simulate")
    parser.add_argument("--admission", choices=ADMISSIONS, default=FIRST_COME, help="who is admitted next")
    parser.add_argument(
        "--known-lengths", action="store_true", help="leave out what predicting each request's length costs an ingress"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: 0)")


def main(options: argparse.Namespace) -> int:
    """Measure; 0, 2 for a wrong option, 130 when interrupted."""
    if min(options.requests, options.replicas, options.tenants) < 1:
        print("Error: --requests, --replicas and --tenants must be at least 1.", file=sys.stderr)
        return 2
    given = argparse.ArgumentParser()
    simulate.add_arguments(given)
    lengths = ["--known-lengths"] * options.known_lengths
    arguments = given.parse_args(["--replicas", str(options.replicas), *lengths])
    try:
        kinds = [
            replace(kind_of(arguments, timed(arguments), policy=policy), admission=options.admission)
            for policy in options.policy.split(",")
        ]
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    requests = chat(options.requests, rate=RATE * options.replicas, tenants=options.tenants, seed=options.seed)
    print(f"{len(requests)} requests in memory: {_peak_mib():.0f} MiB")
    print(f"{'':<22}{'requests/s':>12}{'preemptions':>12}{'peak MiB':>12}")
    try:
        for kind in kinds:
            for name, one in (("ample", kind), ("pressed", pressed(kind))):
                start_s = time.process_time()
                outcome = simulate.run(arguments, one, requests, f"{kind.policy}, {name}", watched=False)
                rate = len(requests) / (time.process_time() - start_s)
                num_preemptions = sum(record.swaps + record.recomputes for record in outcome.records)
                print(
                    f"{f'{kind.policy}, {name}':<22}{rate:>12.0f}{num_preemptions:>12}{_peak_mib():>12.0f}", flush=True
                )
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def _peak_mib() -> float:
    """Most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def chat(num: int, *, rate: float, tenants: int, seed: int) -> list[TraceRequest]:
    """Requests of log-normal lengths that arrive by themselves; a fifth of the tenants send half of them."""
    rng = random.Random(seed)
    at_s, requests = 0.0, []
    for _ in range(num):
        at_s += rng.expovariate(rate)
        prompt, output = (
            min(LONGEST, max(1, round(rng.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))))
            for mean in (PROMPT_MEAN, OUTPUT_MEAN)
        )
        tenant = f"tenant-{rng.randrange(-(-tenants // 5)) if rng.random() < 0.5 else rng.randrange(tenants)}"
        requests.append(TraceRequest(arrival_s=at_s, tenant=tenant, prompt_tokens=prompt, output_tokens=output))
    return requests


def pressed(kind: ReplicaKind) -> ReplicaKind:
    """The same replicas with little memory."""
    return replace(kind, settings=replace(kind.settings, num_blocks=PRESSED_BLOCKS))
