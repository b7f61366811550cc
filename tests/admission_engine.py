"""vLLM's scheduler with ours on top, served by the runner of `tests/scheduler_runs.py`, one request at a time."""

import random
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from replicas.request_stamp import make_stamp
from tests.engine_runs import BLOCK_SIZE, Job
from tests.scheduler_runs import StampingRunner, build_scheduler, expected_tokens


class AdmissionEngine:
    """An engine whose requests have tenants; it counts by itself what each was given."""

    def __init__(
        self, model: Path, *, num_blocks: int, asynchronous: bool = False, settings: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:  # fmt: skip
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.scheduler = build_scheduler(
            model, num_blocks=num_blocks, asynchronous=asynchronous, settings=settings or {}, **changes
        )
        self.runner = StampingRunner(self.scheduler)
        self._depth = 2 if asynchronous else 1
        self._under_way: deque[tuple[Any, Any]] = deque()
        self.jobs: dict[str, Job] = {}
        self.requests: dict[str, Any] = {}
        self.tenants: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        """Of each request's prompt, when it was first admitted."""
        self.admitted: list[str] = []
        """In their order, each time."""
        self.num_left_idle = 0

    def add(
        self, name: str, tenant: str | None, *, prompt: int | tuple[int, ...] = 40, output: int = 20, user: str = "",
        weight: float = 1.0, age_s: float = 0.0, predicted: int | None = None,
    ) -> None:  # fmt: skip
        """Let a request arrive; without a stamp if its tenant is None."""
        from vllm.v1.request import Request

        rng = random.Random(name)
        tokens = prompt if isinstance(prompt, tuple) else tuple(rng.randrange(3, 500) for _ in range(prompt))
        job = Job(prompt=tokens, max_tokens=output)
        stamp = None
        if tenant is not None:
            stamp = make_stamp(
                tenant=tenant, user=user, weight=weight, age_s=age_s, median_tokens=predicted or output,
                upper_tokens=predicted or output,
            )  # fmt: skip
        params = job.sampling_params(extra_args=stamp)
        self.jobs[name], self.tenants[name] = job, tenant or ""
        self.requests[name] = Request(name, list(tokens), params, None, block_hasher=self._hasher)
        self.scheduler.add_request(self.requests[name])

    def step(self) -> None:
        """One step, and the results of the step that is due."""
        scheduler = self.scheduler
        before = sum(scheduler.preemptor.num_preemptions.values())
        step = scheduler.schedule()
        for new in step.scheduled_new_reqs:
            self.cached[new.req_id] = new.num_computed_tokens
            self.admitted.append(new.req_id)
        self.admitted += step.scheduled_cached_reqs.resumed_req_ids
        if scheduler.admission is not None:
            scheduler.admission.core.check()
            preempted = sum(scheduler.preemptor.num_preemptions.values()) > before  # such a step admits nobody
            full = step.total_num_scheduled_tokens >= scheduler.max_num_scheduled_tokens
            if not preempted and not full and scheduler.admission.left_idle() is not None:
                self.num_left_idle += 1
        self._under_way.append((step, self.runner.execute(step)))
        if len(self._under_way) >= self._depth:
            scheduler.update_from_output(*self._under_way.popleft())

    def abort(self, name: str) -> None:
        """Its client has left."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def finish(self, most_steps: int = 20_000) -> None:
        """Serve all that there is."""
        for _ in range(most_steps):
            if not self.scheduler.has_requests():
                break
            self.step()
        else:
            raise AssertionError("nothing moves any more")
        while self._under_way:
            self.scheduler.update_from_output(*self._under_way.popleft())

    def output_tokens(self) -> Counter[str]:
        """Delivered so far, by tenant."""
        tokens = Counter[str]()
        for name, request in self.requests.items():
            tokens[self.tenants[name]] += request.num_output_tokens
        return tokens

    def check_tokens(self, names: Iterable[str] | None = None) -> None:
        """Assert that each request has the tokens that it should have."""
        for name in self.requests if names is None else names:
            assert tuple(self.requests[name].output_token_ids) == expected_tokens(self.jobs[name]), name
