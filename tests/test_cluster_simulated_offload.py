"""Goal: the simulated offloading does step for step what vLLM's own does.

Method: vLLM's scheduler with the real `OffloadingConnector` of its side, and the real logic of the connector's worker over
copies that only take time, on one clock with the simulated engine. Blocks of one transfer are equally old for vLLM, in the
order of a set of hashes: here they are in the order in which they were stored.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.simulated_offload import MOST_IDLE_STEPS, SimulatedOffload
from replicas.throttled_link import Direction, LinkSettings, ThrottledLink
from tests.engine_runs import BLOCK_SIZE
from tests.lockstep_runs import TIMES, Case, Clock, of_simulation, of_vllm, settings_of
from tests.scheduler_runs import build_scheduler

pytestmark = pytest.mark.engine

BLOCK_BYTES = 2 * BLOCK_SIZE * 2 * 32 * 4
PAGE = 4096
LINK = LinkSettings(bytes_per_s=100 * BLOCK_BYTES, latency_s=0.002)


class LinkCopies:
    """Stands for the GPU's copies: they take what a link takes."""

    def __init__(self, link: ThrottledLink, clock: Clock) -> None:
        self._link, self._clock = link, clock
        self._done_s: dict[int, float] = {}
        self.at_s = 0.0
        """Where the step is that submits."""

    def submit_store(self, job_id: int, source: Any, _: Any) -> bool:
        return self._submit(job_id, source, Direction.OUT)

    def submit_load(self, job_id: int, _: Any, target: Any) -> bool:
        return self._submit(job_id, target, Direction.IN)

    def wait(self, job_ids: set[int]) -> None:
        self.at_s = max([self.at_s, *(self._done_s.get(job_id, 0.0) for job_id in job_ids)])

    def get_finished(self) -> list[Any]:
        from vllm.v1.kv_offload.base import TransferResult

        done = [job_id for job_id, done_s in self._done_s.items() if done_s <= self._clock.now_s]
        for job_id in done:
            del self._done_s[job_id]
        return [TransferResult(job_id=job_id, success=True) for job_id in done]

    def _submit(self, job_id: int, blocks: Any, direction: Direction) -> bool:
        num_bytes = len(blocks.block_ids) * BLOCK_BYTES
        self._done_s[job_id] = self._link.submit(direction, num_bytes, self.at_s).done_s
        return True


class OffloadingRunner:
    """Executes steps in name only, with the connector's worker as vLLM's runner drives it."""

    def __init__(self, scheduler: Any, clock: Clock) -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

        self._scheduler, self._clock, self._rng = scheduler, clock, random.Random(1)
        self._worker: Any = OffloadingConnector(
            scheduler.vllm_config, KVConnectorRole.WORKER, scheduler.kv_cache_config
        ).connector_worker
        self._copies = self._worker.worker = LinkCopies(ThrottledLink(LINK), clock)
        self._ended_s = 0.0
        self.num_stored = self.num_loaded = 0
        manager = scheduler.connector.connector_scheduler.manager
        for name in ("complete_store", "complete_load"):
            setattr(manager, name, _in_order(manager, getattr(manager, name)))

    def execute(self, step: Any) -> Any:
        """Run one step; return vLLM's `ModelRunnerOutput`."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        metadata, names = step.kv_connector_metadata, list(step.num_scheduled_tokens)
        self.num_stored += sum(len(job.src_spec.block_ids) for job in metadata.store_jobs.values())
        self.num_loaded += sum(len(job.dst_spec.block_ids) for job in metadata.load_jobs.values())
        self._copies.at_s = max(self._clock.executed_s, self._ended_s)
        self._worker.handle_preemptions(metadata)
        self._worker.start_kv_transfers(metadata)
        self._worker.prepare_store_kv(metadata)
        _, loaded = self._worker.get_finished(set())
        self._ended_s = self._clock.now_s
        requests = [self._scheduler.requests[name] for name in names]
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[
                [self._rng.randrange(3, 500)] if one.num_computed_tokens == one.num_tokens else [] for one in requests
            ],
            kv_connector_output=KVConnectorOutput(
                finished_recving=loaded or None, kv_connector_worker_meta=self._worker.build_connector_worker_meta()
            ),
        )  # fmt: skip


def _in_order(manager: Any, complete: Any) -> Any:
    def ordered(keys: Any, *arguments: Any) -> None:
        complete([key for key in manager._policy.blocks if key in keys], *arguments)

    return ordered


@dataclass(frozen=True, kw_only=True)
class Offloaded:
    """A workload, and how it is offloaded."""

    case: Case
    host_blocks: int = 4000
    prompt_only: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def case(seed: int, **changes: Any) -> Case:
    return Case(**{"seed": seed, "steps": 3000, "equal": False, "interval": 4.0} | changes)  # type: ignore[arg-type]


CACHING = {"enable_prefix_caching": True}
CASES = {
    "plain": Offloaded(case=case(50, settings=CACHING)),
    "no prefix cache": Offloaded(case=case(51)),
    "prompts alone": Offloaded(case=case(52, settings=CACHING), prompt_only=True),
    "small host": Offloaded(case=case(53, settings=CACHING), host_blocks=60),
    "shared prefixes": Offloaded(
        case=case(54, interval=5.0, shared=True, num_blocks=90, output=(100, 300), settings=CACHING)
    ),
    "small chunks": Offloaded(case=case(55, settings=CACHING | {"max_num_batched_tokens": 64})),
}


@pytest.mark.parametrize("name", CASES)
def test_offloading_is_vllms_own(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    one, clock = CASES[name], Clock()
    scheduler = build_scheduler(
        tiny_model, num_blocks=one.case.num_blocks, asynchronous=False, stock=True, settings={},
        hf_overrides={"max_position_embeddings": 2048},
        kv_transfer_config={
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "cpu_bytes_to_use": one.host_blocks * max(PAGE, BLOCK_BYTES), "offload_prompt_only": one.prompt_only,
            },
        },
        **{"max_num_batched_tokens": 512, "max_model_len": 2048} | one.case.settings,
    )  # fmt: skip
    settings = settings_of(scheduler)
    offload = SimulatedOffload(
        num_host_blocks=one.host_blocks, block_size=BLOCK_SIZE, block_bytes=BLOCK_BYTES, link=ThrottledLink(LINK),
        caching=settings.enable_prefix_caching, prompt_only=one.prompt_only,
    )  # fmt: skip
    runner = OffloadingRunner(scheduler, clock)
    simulation = of_simulation(settings, one.case, offload, clock, TIMES)
    vllm = of_vllm(scheduler, one.case, runner.execute, clock)
    num_preempted = 0
    for step, (ours, theirs) in enumerate(zip(simulation, vllm, strict=True)):
        assert ours == theirs, f"step {step}"
        num_preempted += len(ours[1])
    assert num_preempted > 25
    assert (offload.num_stored_blocks, offload.num_loaded_blocks) == (runner.num_stored, runner.num_loaded)
    assert offload.num_loaded_blocks > 0


def test_who_does_not_fit_before_those_who_hold_the_blocks_is_said_to_stand_still() -> None:
    offload = SimulatedOffload(
        num_host_blocks=9, block_size=BLOCK_SIZE, block_bytes=BLOCK_BYTES, link=ThrottledLink(LINK), caching=True
    )
    for _ in range(1000):
        offload.nobody_runs(copies=True)
    for _ in range(MOST_IDLE_STEPS):
        offload.nobody_runs(copies=False)
    with pytest.raises(ValueError, match="stands still"):
        offload.nobody_runs(copies=False)
