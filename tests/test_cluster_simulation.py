"""Goal: a simulated cluster loses nothing, says the same every time, and strides through decodes without a difference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.disturbances import Disturbances
from cluster.records import RequestRecord
from cluster.routing import LeastLoaded, Placed, RoundRobin
from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_preemption import SimulatedPreemption
from cluster.simulated_replica import Replica
from cluster.simulated_step import SimulatedSettings
from cluster.simulated_swaps import SimulatedSwaps
from cluster.simulated_time import LinearTimes
from cluster.simulation import Simulation
from cost_service.snapshot import CostSnapshot
from cost_service.traces import TraceRequest
from replicas.config import PreemptionPolicy, SwapConfig
from replicas.guard import GuardSettings
from replicas.preemptor import Preemptor
from replicas.throttled_link import LinkSettings, ThrottledLink

BLOCK_SIZE, BLOCK_BYTES = 4, 1000

TIMES = LinearTimes(fixed_s=0.01, decode_s=1e-4, context_s=1e-6, prefill_fixed_s=2e-3, token_s=1e-3, attention_s=1e-6)
STALLING = CostSnapshot(
    version=1, model="m", hardware="h", parallelism=1, block_size=BLOCK_SIZE, recompute_fixed_s=2e-3, ridge_tokens=0.0,
    token_s=1e-3, attention_s=1e-6, swap_fixed_s=1e-3, out_block_s=1e-4, in_block_s=1e-4,
)  # fmt: skip
BESIDE = replace(STALLING, out_block_s=0.0, in_block_s=0.0, link_out_block_s=1e-3, link_in_block_s=1e-3)

ENGINE = SimulatedSettings(
    num_blocks=40, block_size=BLOCK_SIZE, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=120
)


def engine_of(
    policy: str, *, link: ThrottledLink | None = None, engine: SimulatedSettings = ENGINE, throttle: float | None = None
) -> SimulatedEngine:
    if policy == "stock":
        return SimulatedEngine(engine, TIMES)
    costs = STALLING if link is None else BESIDE
    config = SwapConfig(
        preemption=PreemptionPolicy(policy), host_pool_bytes=60 * BLOCK_BYTES, throttled_link_bytes_per_s=throttle
    )
    swaps = SimulatedSwaps(config, costs, block_bytes=BLOCK_BYTES, num_pool_blocks=engine.num_blocks, host_link=link)
    preemptor = Preemptor(PreemptionPolicy(policy), costs, meter=swaps.scheduling.meter, guard=GuardSettings())
    return SimulatedEngine(engine, TIMES, preemption=SimulatedPreemption(preemptor, swaps))


def cluster_of(policy: str, *, linked: bool = False, **changes: Any) -> Callable[[int], SimulatedEngine]:
    """Builds engines; two replicas are a host, and share its link."""
    links: dict[int, ThrottledLink] = {}

    def build(number: int) -> SimulatedEngine:
        link = links.setdefault(number // 2, ThrottledLink(LinkSettings(bytes_per_s=1e6))) if linked else None
        return engine_of(policy, link=link, engine=replace(ENGINE, **changes))

    return build


def trace(num: int = 200, interval_s: float = 0.05) -> list[TraceRequest]:
    """Requests of all lengths; with four replicas' blocks they do not fit."""
    return [
        TraceRequest(
            arrival_s=number * interval_s, tenant=f"t{number % 3}", prompt_tokens=1 + number * 7 % 50,
            output_tokens=1 + number * 13 % 60,
        )
        for number in range(num)
    ]  # fmt: skip


def run(
    build: Callable[[int], SimulatedEngine], requests: list[TraceRequest], *, num_replicas: int = 3, **arguments: Any
) -> tuple[list[RequestRecord], Simulation]:
    records: list[RequestRecord] = []
    arguments.setdefault("router", RoundRobin())
    simulation = Simulation(build, num_replicas=num_replicas, done=records.append, **arguments)
    simulation.run(requests)
    return records, simulation


def test_one_request_takes_its_prefill_and_its_decodes() -> None:
    (record,), _ = run(cluster_of("stock"), [TraceRequest(arrival_s=1.0, tenant="", prompt_tokens=10, output_tokens=3)])
    prefill_s = 0.01 + 2e-3 + 10 * 1e-3 + 100 * 1e-6
    decodes_s = (0.01 + 1e-4 + 11e-6) + (0.01 + 1e-4 + 12e-6)
    assert record.first_token_s == pytest.approx(1.0 + prefill_s)
    assert record.finish_s == pytest.approx(1.0 + prefill_s + decodes_s)


def test_a_request_that_comes_within_a_stride_waits_for_the_step_under_way() -> None:
    requests = [
        TraceRequest(arrival_s=0.0, tenant="", prompt_tokens=1, output_tokens=50),
        TraceRequest(arrival_s=0.1, tenant="", prompt_tokens=1, output_tokens=1),
    ]
    records, _ = run(cluster_of("stock"), requests, num_replicas=1)
    short = min(records, key=lambda record: record.output_tokens)
    step_s = 0.01 + 1e-4
    assert short.first_token_s is not None
    # The tenth step is under way when it comes; then it is a part of the eleventh.
    assert 0.1 + step_s < short.first_token_s < 0.1 + 2.1 * step_s


@pytest.mark.parametrize("policy", ["stock", "recompute", "swap", "adaptive"])
@pytest.mark.parametrize("linked", [False, True], ids=["copies stall", "copies beside"])
@pytest.mark.parametrize("caching", [False, True], ids=["prefix cache off", "prefix cache on"])
def test_strides_and_single_steps_give_the_same(policy: str, linked: bool, caching: bool) -> None:
    ours, theirs = (
        run(cluster_of(policy, linked=linked, enable_prefix_caching=caching, strides=strides), trace(), check=strides)
        for strides in (True, False)
    )
    assert sum(record.swaps + record.recomputes for record in ours[0]) > 20
    assert [record.request_id for record in ours[0]] == [record.request_id for record in theirs[0]]
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert (one.swaps, one.recomputes) == (other.swaps, other.recomputes)
        assert (one.first_token_s, one.finish_s) == pytest.approx((other.first_token_s, other.finish_s), rel=1e-9)
    for one_, other_ in zip(ours[1].replicas, theirs[1].replicas, strict=True):
        assert one_.engine.num_steps == other_.engine.num_steps
        assert one_.engine.num_scheduled_tokens == other_.engine.num_scheduled_tokens
        assert one_.engine.least_free_blocks == other_.engine.least_free_blocks


class Reader:
    """Reads how far each running request of a replica is."""

    def __init__(self) -> None:
        self.all: list[tuple[int, int, dict[str, int]]] = []

    def up(self, replica: Replica) -> None: ...

    def down(self, replica: Replica) -> None: ...

    def report(self, replica: Replica, now_s: float) -> tuple[int, int, dict[str, int]]:
        num_outputs = {request.request_id: request.num_output for request in replica.engine.running}
        return replica.number, replica.epoch, num_outputs

    def read(self, message: tuple[int, int, dict[str, int]], now_s: float) -> int:
        self.all.append(message)
        return message[1]

    def learn(self, replica: Replica, answer: int) -> None:
        assert answer == replica.epoch, "an answer to another life"


@pytest.mark.parametrize("policy", ["stock", "swap", "adaptive"])
def test_routers_readers_and_crashes_find_the_same_within_strides(policy: str) -> None:
    disturbances = Disturbances(
        seed=5, crash_interval_s=4.0, restart_s=0.5, resubmit=False, leave_share=0.3, patience_s=0.5
    )
    seen = []
    for strides in (True, False):
        reader = Reader()
        records, simulation = run(
            cluster_of(policy, linked=True, strides=strides), trace(400, 0.1), router=LeastLoaded(), exchange=reader,
            disturbances=disturbances, check=True,
        )  # fmt: skip
        told = [(one.request_id, one.delivered_tokens, one.swaps, one.recomputes) for one in records]
        seen.append((told, reader.all, simulation.counts))
    assert seen[0] == seen[1]
    assert min(seen[0][2].lost, seen[0][2].crashes, seen[0][2].left) > 3


REQUESTS = st.lists(
    st.builds(
        TraceRequest, arrival_s=st.floats(0.0, 3.0), tenant=st.sampled_from("abc"), prompt_tokens=st.integers(1, 60),
        output_tokens=st.integers(1, 60), prefix_hashes=st.lists(st.integers(0, 2), max_size=1).map(tuple),
    ),
    min_size=1, max_size=40,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    requests=REQUESTS, policy=st.sampled_from(["stock", "recompute", "swap", "adaptive"]), linked=st.booleans(),
    caching=st.booleans(), router=st.sampled_from([RoundRobin, LeastLoaded, Placed]), resubmit=st.booleans(),
    seed=st.integers(0, 100), crashes=st.booleans(), num_blocks=st.integers(32, 60),
)  # fmt: skip
def test_nothing_is_lost_whatever_happens(
    requests: list[TraceRequest], policy: str, linked: bool, caching: bool, router: Any, resubmit: bool, seed: int,
    crashes: bool, num_blocks: int,
) -> None:  # fmt: skip
    reader = Reader()
    disturbances = Disturbances(
        seed=seed, crash_interval_s=2.0 if crashes else float("inf"), restart_s=0.5, resubmit=resubmit,
        leave_share=0.3, patience_s=0.5, report_delay_s=0.2, report_loss=0.3,
    )  # fmt: skip
    requests.sort(key=lambda one: one.arrival_s)
    build = cluster_of(policy, linked=linked, enable_prefix_caching=caching, num_blocks=num_blocks)
    router = router()
    records, simulation = run(
        build, requests, num_replicas=2, router=router, disturbances=disturbances, exchange=reader, check=True
    )
    if isinstance(router, Placed):
        router.placement.check()
    counts = simulation.counts
    assert counts.arrived == len(requests) == len(records) == counts.finished + counts.left + counts.lost
    assert len({record.request_id for record in records}) == len(records)
    for record in records:
        one = requests[int(record.request_id)]
        assert (record.tenant, record.arrival_s, record.prompt_tokens, record.output_tokens) == (
            one.tenant, one.arrival_s, one.prompt_tokens, one.output_tokens,
        )  # fmt: skip
        assert record.delivered_tokens == record.output_tokens or record.finish_s is None
    for replica in simulation.replicas:
        if replica.up and not replica.engine.num_requests and policy == "stock":
            assert replica.engine.blocks.num_free == num_blocks - 1
    for _, _, num_outputs in reader.all:
        assert all(num <= requests[int(name)].output_tokens for name, num in num_outputs.items())


def test_the_same_seed_gives_the_same_run() -> None:
    disturbances = Disturbances(seed=3, crash_interval_s=5.0, restart_s=1.0, leave_share=0.2)
    first, again = (
        run(cluster_of("adaptive", linked=True), trace(), router=LeastLoaded(), disturbances=disturbances)[0]
        for _ in range(2)
    )
    assert first == again
    other = run(cluster_of("adaptive", linked=True), trace(), disturbances=replace(disturbances, seed=4))[0]
    assert other != first
