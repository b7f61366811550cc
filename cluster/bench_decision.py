"""`python -m cluster bench-decision`: what one decision costs, in process and without an engine.

Preemption: pricing the candidates (their table is built already), building the table, and reading the views of all running
requests out of vLLM's own blocks and requests. Admission: letting one more request wait, and choosing and taking out who is
next, with few and with many who wait, of one tenant and of a thousand; reading what the cluster says of tenants. Placement:
hashing a prompt's beginning, and choosing among replicas that tell of the backlogs of as many tenants as they name at most.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cost_service.analytic import analytic_snapshot
from cost_service.charges import Served
from cost_service.hardware import HARDWARE
from cost_service.learner import BLOCK_KNOTS, TOKEN_KNOTS
from cost_service.model_shape import SEVEN_BILLION
from cost_service.prompt_text import BYTES_PER_TOKEN
from cost_service.result_file import write_json
from cost_service.service_messages import MAX_BACKLOG_TENANTS, Known, ReplicaLoad, Share
from global_scheduler.placement import Placement
from global_scheduler.prefix_homes import Mark, prompt_marks
from replicas.admission import RequestAdmission
from replicas.fair_queue import FairQueue, Waiting
from replicas.host_pool import HostBlockPool
from replicas.messages import SetShares, decode_to_engine, encode
from replicas.preemption import AdaptivePolicy
from replicas.preemption_cost import Candidate, CandidateTable, Pressure
from replicas.request_stamp import make_stamp
from replicas.tenant_service import TenantService

BLOCK_SIZE, ROUNDS = 16, 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--candidates", type=int, default=32, help="candidates that are priced (default: 32)")
    parser.add_argument("--requests", type=int, default=256, help="running requests that are read (default: 256)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each of them (default: 4096)")
    parser.add_argument(
        "--replicas", type=int, nargs="+", default=[64, 1000], metavar="N", help="that are chosen of (default: 64 1000)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def main(options: argparse.Namespace) -> int:
    """Measure and print medians in microseconds; 0."""
    figures = measure(options.candidates, options.requests, options.tokens, options.replicas)
    for name, value_us in figures.items():
        print(f"{name:<64}{value_us:>9.1f} us")
    if options.json:
        write_json({"benchmark": "decision", "median_us": figures}, options.json)
    return 0


def measure(num_candidates: int, num_requests: int, num_tokens: int, num_replicas: list[int]) -> dict[str, float]:
    """Median microseconds of each part."""
    rng = random.Random(0)
    candidates = [candidate(str(number), rng.randint(1, 4096)) for number in range(num_candidates)]
    around = Pressure(
        num_needed_blocks=2, num_pool_blocks=8192, num_running=num_candidates, num_batch_tokens=num_candidates,
        num_free_host_slots=10_000,
    )  # fmt: skip
    costs = analytic_snapshot(
        SEVEN_BILLION,
        HARDWARE["H100"],
        model="",
        parallelism=1,
        block_size=BLOCK_SIZE,
        block_bytes=BLOCK_SIZE * 131_072,
    )
    learned = replace(
        costs,
        recompute_knots_s=(1e-4,) * TOKEN_KNOTS,
        out_knots_s=(1e-4,) * BLOCK_KNOTS,
        in_knots_s=(1e-4,) * BLOCK_KNOTS,
    )
    table = CandidateTable(candidates, block_size=BLOCK_SIZE, horizon_tokens=32)
    view, requests, host = views(num_requests, num_tokens)
    decisions = {
        f"pricing {num_candidates} candidates": median_us(lambda: table.price(around, costs)),
        f"pricing {num_candidates} candidates, learned costs": median_us(lambda: table.price(around, learned)),
        f"table of {num_candidates} candidates": median_us(
            lambda: CandidateTable(candidates, block_size=BLOCK_SIZE, horizon_tokens=32)
        ),
        f"a whole choice among {num_candidates}": median_us(lambda: AdaptivePolicy().choose(candidates, around, costs)),
        f"views of {num_requests} requests of {num_tokens} tokens": median_us(
            lambda: [view.candidate(request, host, survival=0.0) for request in requests]
        ),
        f"marks of a prompt of {num_tokens} tokens": median_us(lambda: marks_of(num_tokens)),
        **{f"placing among {num} replicas": median_us(placing(num, num_tokens)) for num in num_replicas},
    }
    for num_waiting in (100, 10_000):
        for num_tenants in (1, 1000):
            name = f"of {num_waiting:,} waiting, {min(num_waiting, num_tenants):,} tenants"
            added, taken = queue_us(num_waiting, num_tenants)
            decisions |= {f"fair queue, add: {name}": added, f"fair queue, peek and pop: {name}": taken}
    for num_tenants in (200, 10_000):
        for where in ("present", "absent"):
            decisions[f"an engine hears of {num_tenants:,} {where} tenants"] = hearing_us(num_tenants, where=where)
    return decisions


def hearing_us(num_tenants: int, *, where: str) -> float:
    """Median microseconds in which an engine reads and takes what the cluster says of tenants that are present or absent."""
    admission, names = RequestAdmission(), [f"tenant-{number}" for number in range(num_tenants)]
    for name in names if where == "present" else ():
        admission.add(name, tenant=name, arrival_s=0.0, service_s=1.0, num_prompt_tokens=100)
    known = Known(counter=1e6, included=0.0)
    shares = [Share(tenant=name, known=known, weight=1.0, waits=True) for name in names]
    data = encode(SetShares(shares=shares, answered=1))

    def hear() -> None:
        message = decode_to_engine(data)
        assert isinstance(message, SetShares)
        admission.learn(message.shares, answered=message.answered)

    return median_us(hear)


def queue_us(num_waiting: int, num_tenants: int) -> tuple[float, float]:
    """Median microseconds of an `add` and of a `peek` and `pop`, in a queue that stays as long; every pop is charged."""
    rng, service = random.Random(0), TenantService()
    queue = FairQueue(service)
    waiting = (
        Waiting(
            request_id=f"{number}", account=service.account(f"t{number % num_tenants}", f"u{rng.randrange(5)}"),
            arrival_s=rng.uniform(0.0, 100.0), service_s=rng.lognormvariate(0.0, 1.5), held=rng.uniform(10.0, 1000.0),
        )
        for number in count()
    )  # fmt: skip
    for each in islice(waiting, num_waiting):
        queue.add(each)
    queue.begin_step(200.0)
    times_us: list[tuple[float, float]] = []
    for new in islice(waiting, 3 * ROUNDS):
        start_ns = time.perf_counter_ns()
        queue.add(new)
        added_ns = time.perf_counter_ns()
        queue.peek()
        popped = queue.pop()
        times_us.append(((added_ns - start_ns) / 1000, (time.perf_counter_ns() - added_ns) / 1000))
        service.charge(popped.request_id, popped.account, Served(num_output_tokens=10))
    added, taken = zip(*times_us, strict=True)
    return statistics.median(added), statistics.median(taken)


def marks_of(num_tokens: int) -> list[Mark]:
    """Of a prompt of so many tokens."""
    return prompt_marks([b"x" * num_tokens * BYTES_PER_TOKEN], salt="", bytes_per_token=BYTES_PER_TOKEN)


def placing(num_replicas: int, num_tokens: int) -> Callable[[], object]:
    """What places a request, and sees its end, where others were sent and all replicas are at work."""
    placement, rng, marks = Placement(), random.Random(0), marks_of(num_tokens)
    for number in range(num_replicas):
        backlog = {f"t{tenant}": rng.randrange(10_000) for tenant in range(MAX_BACKLOG_TENANTS)}
        placement.up(f"{number:04}")
        load = ReplicaLoad(
            epoch="", sequence=1, num_running=9, num_waiting=9, num_blocks=30_000, num_free_blocks=rng.randrange(9000),
            block_size=BLOCK_SIZE, num_waiting_tokens=sum(backlog.values()), backlog=backlog,
        )  # fmt: skip
        placement.report(f"{number:04}", load, as_of_s=0.0, now_s=0.0)
    for number in range(num_replicas):
        placement.place(f"before {number}", tenant=f"t{number % 40}", num_tokens=num_tokens, marks=marks, now_s=1.0)

    def place() -> None:
        placement.place("one", tenant="t3", num_tokens=num_tokens, marks=marks, now_s=1.0)
        placement.ended("one")

    return place


def candidate(name: str, num_tokens: int) -> Candidate:
    """A request of so many tokens that shares nothing."""
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    return Candidate(request_id=name, num_tokens=num_tokens, num_blocks=num_blocks, num_freed_blocks=num_blocks)


def views(num_requests: int, num_tokens: int) -> tuple[Any, list[Any], HostBlockPool]:
    """A view of vLLM's own requests and blocks, every fourth of them shared; only the scheduler around them is made up."""
    from vllm import SamplingParams

    from replicas.vllm_internals import KVCacheBlock, Request
    from replicas.vllm_memory import MemoryView

    blocks = {
        str(number): [KVCacheBlock(block) for block in range(num_tokens // BLOCK_SIZE)]
        for number in range(num_requests)
    }
    for own in blocks.values():
        for index, block in enumerate(own):
            block.ref_cnt = 2 if index < len(own) // 4 else 1
    pool = SimpleNamespace(get_num_free_blocks=lambda: 0)
    managers = SimpleNamespace(single_type_managers=[SimpleNamespace(req_to_blocks=blocks)])
    scheduler = SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[None]),
        kv_cache_manager=SimpleNamespace(block_pool=pool, coordinator=managers),
        block_size=BLOCK_SIZE, max_num_scheduled_tokens=8192, max_num_running_reqs=num_requests, num_lookahead_tokens=0,
    )  # fmt: skip
    params = SamplingParams(max_tokens=64, extra_args=make_stamp(tenant="t", median_tokens=20, upper_tokens=50))
    requests = [Request(name, [3] * num_tokens, params, None) for name in blocks]
    for request in requests:
        request.num_computed_tokens = num_tokens
    return MemoryView(scheduler), requests, HostBlockPool(1000, block_size=BLOCK_SIZE)


def median_us(work: Callable[[], object]) -> float:
    """Median of many rounds, after some that do not count."""
    times_us = []
    for number in range(ROUNDS + ROUNDS // 10):
        start_ns = time.perf_counter_ns()
        work()
        if number >= ROUNDS // 10:
            times_us.append((time.perf_counter_ns() - start_ns) / 1000)
    return statistics.median(times_us)
