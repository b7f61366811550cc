"""How a simulated engine admits those who wait: as vLLM's waiting loop does, in whatever order they stand.

Rule: those who were passed over before (`loading`) go first, as in vLLM; in a fair order they stand among the others.

Source: vLLM 0.29 `v1/core/sched/scheduler.py` (`schedule`, the waiting loop), `v1/core/kv_cache_manager.py`
(`allocate_slots`).
"""

from typing import TYPE_CHECKING

from cluster.simulated_blocks import NO_HIT
from cluster.simulated_request import SimulatedRequest, Status
from cluster.simulated_reservation import peak_tokens
from cluster.simulated_step import Step

if TYPE_CHECKING:
    from cluster.simulated_engine import SimulatedEngine


class SimulatedAdmission:
    """Admission at one simulated engine."""

    def __init__(self, engine: "SimulatedEngine") -> None:
        self._engine = engine
        self._next_step = 0
        """Before which nobody is admitted beside others."""

    def admit(self, step: Step, budget: int, now_s: float) -> None:
        """Admit those whose turn it is while there is room, in every respect."""
        engine = self._engine
        if engine.num_steps < self._next_step and engine.running:
            return
        admitted: list[SimulatedRequest] = []
        passed: list[SimulatedRequest] = []
        while budget > 0 and (engine.loading or engine.waiting) and len(engine.running) < engine.settings.max_num_seqs:
            request = engine.loading[0] if engine.loading and engine.fair is None else engine.waiting.peek(now_s)
            if request.status is Status.LOADING and request.request_id in engine.loaded:
                engine.loaded.remove(request.request_id)
                request.num_full_blocks = request.num_computed // engine.settings.block_size
                engine.blocks.cache(request.holding, request.num_full_blocks)
                request.num_computed = min(
                    request.num_computed, request.num_tokens - 1
                )  # the last one is computed anew
                request.status = Status.PREEMPTED
            if engine.settings.reserve_output and not self._fits_to_the_end(request):
                break
            if request.status is not Status.LOADING:
                num_new = self._allocate(step, request, budget, now_s)
                if num_new is None:
                    break
                budget -= num_new
            self._take(request, now_s)
            if request.status is not Status.RUNNING:
                passed.append(request)
            else:
                admitted.append(request)
        engine.loading[:0] = passed
        if admitted:
            self._next_step = engine.num_steps + engine.settings.steps_between_admissions
        if engine.fair is not None:
            engine.fair.end_step(admitted, passed)

    def _take(self, request: SimulatedRequest, now_s: float) -> None:
        """Let a request wait no more whose turn it was."""
        engine = self._engine
        if engine.fair is not None:
            engine.waiting.pop(now_s)
        if request in engine.loading:
            engine.loading.remove(request)
            return
        if engine.fair is None:
            engine.waiting.pop(now_s)
        engine.count_waiting(request, -request.num_tokens)

    def _allocate(self, step: Step, request: SimulatedRequest, budget: int, now_s: float) -> int | None:
        """Give a waiting request its blocks: it runs then, or loads (0 tokens); None: it must wait, and all behind it.

        One that can load, but not yet, is passed over: 0 tokens too.
        """
        engine = self._engine
        settings, blocks = engine.settings, engine.blocks
        hit, loaded, asynchronous = NO_HIT, 0, False
        num_computed, num_held = request.num_computed, request.num_blocks
        if num_computed == 0:
            hit = blocks.find(request.holding, (request.num_tokens - 1) // settings.block_size)
            num_computed, num_held = hit.num_blocks * settings.block_size, hit.num_blocks
            if engine.preemption is not None:
                loadable, asynchronous = engine.preemption.num_loadable_tokens(request, num_computed, now_s)
                if loadable is None:
                    return 0
                loaded = loadable
                num_computed += loaded
        num_new = 0 if asynchronous else request.num_tokens - num_computed
        if num_new > budget:
            if not settings.enable_chunked_prefill:
                return None
            num_new = budget
        kept = engine.watermark_blocks if engine.running else 0
        num_all = (
            max(0, engine.running.num_blocks_of(request.num_tokens) - num_held) if settings.reserve_full_isl else 0
        )
        num_blocks = engine.running.num_blocks_of(num_computed + num_new)
        num_wanted = max(0, num_blocks - num_held)
        reserved = self._num_reserved() if asynchronous else 0
        if max(num_all, num_wanted + reserved) + hit.num_free_blocks + kept > blocks.num_free:
            return None
        if request.num_computed == 0:
            blocks.hold(request.holding, hit)
            request.num_blocks = request.num_full_blocks = hit.num_blocks
        request.num_computed = num_computed
        if asynchronous:
            blocks.take(num_wanted)
            request.num_blocks = num_blocks
            request.status = Status.LOADING
            engine.holders.add(request)
        else:
            engine.holders.discard(request)
            step.prefills.append((request, num_computed, num_new))
            engine.running.start(request, num_new, num_blocks)
        if engine.preemption is not None:
            engine.preemption.load(request, loaded, now_s)
        return num_new

    def _fits_to_the_end(self, request: SimulatedRequest) -> bool:
        """Whether all who run and this one could get all their output; a prefill's step gives a token too."""
        engine = self._engine
        engine.running.settle()
        progress = [
            (one.prompt_tokens + max(1, one.num_output), one.max_tokens - one.num_output - 1)
            for one in [*engine.running, request]
        ]  # fmt: skip
        pool = (engine.settings.num_blocks - 1) * engine.settings.block_size
        return peak_tokens(progress) <= pool

    def _num_reserved(self) -> int:
        """Blocks that requests with loads under way will still want."""
        running = self._engine.running
        return sum(max(0, running.num_blocks_of(one.num_tokens) - one.num_blocks) for one in self._engine.holders)
