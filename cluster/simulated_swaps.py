"""Copies between a simulated engine's KV blocks and host memory: the engine's own books, and a worker that takes time.

Rules:
- What is copied when is planned by the engine's own `SwapScheduling`; block ids are made up, for only their number matters.
- A copy takes `swap_fixed_s` and so much per block from its engine, as the snapshot says. Where it goes on beside the engine
  (asynchronous, a GPU), it also has its host's link to pass, which all engines of the host share; what is loaded can be used
  when it is done. The step that took the blocks of a victim waits for their copy: it overwrites them
  (`replicas.copy_schedule`).
- A throttled link (simulated by the engine itself, on CPU) is `SwapScheduling`'s own.
"""

from dataclasses import dataclass

from cluster.simulated_request import SimulatedRequest
from cost_service.snapshot import CostSnapshot
from replicas.config import SwapConfig
from replicas.swap_planner import SwapPlan
from replicas.swap_scheduling import SwapScheduling
from replicas.throttled_link import Direction, ThrottledLink


@dataclass(slots=True, kw_only=True)
class _Copies:
    """What the worker says of one step."""

    num_blocks: dict[Direction, int]
    seconds: dict[Direction, float]


class SimulatedSwaps:
    """The KV connector of one simulated engine."""

    def __init__(
        self,
        config: SwapConfig,
        costs: CostSnapshot,
        *,
        block_bytes: int,
        num_pool_blocks: int,
        host_link: ThrottledLink | None = None,
    ) -> None:
        """Begin with an empty host pool.

        Args:
            costs: What copies really cost.
            block_bytes: Bytes of one KV block.
            host_link: The way to host memory, beside the engine; None: the engine copies by itself, and waits.
        """
        self.costs, self.link = costs, host_link
        self.throttled = config.throttled_link_bytes_per_s is not None
        self._block_bytes = block_bytes
        num_slots = min(config.host_pool_bytes // block_bytes, 64 * num_pool_blocks)
        self.scheduling = SwapScheduling(
            config, num_slots, block_bytes, block_size=costs.block_size, num_pool_blocks=num_pool_blocks,
            asynchronous=host_link is not None,
        )  # fmt: skip
        self.pool = self.scheduling.planner.pool
        self._next_block = 0
        self._copies: _Copies | None = None
        self._out_done_s: dict[str, float] = {}
        self._loading: dict[str, float] = {}
        """When each asynchronous load is done."""
        self.num_swapped_out_blocks = self.num_swapped_in_blocks = 0

    @property
    def first_load_s(self) -> float:
        """When the next asynchronous load is done; infinite without any."""
        return min(self._loading.values(), default=float("inf"))

    def swap_out(self, request: SimulatedRequest, now_s: float) -> int | None:
        """Plan the copy of a victim's blocks; return how many are copied, or None when the host pool has no room."""
        return self.scheduling.swap_out(
            request.request_id, tenant=request.tenant, num_tokens=request.num_computed,
            block_ids=self._ids(request.num_blocks), now_s=now_s,
        )  # fmt: skip

    def load(self, request: SimulatedRequest, num_loaded_tokens: int, now_s: float) -> None:
        """Plan the load into the blocks that a request has got."""
        self.scheduling.load(
            request.request_id, num_tokens=request.num_tokens, num_loaded_tokens=num_loaded_tokens,
            block_ids=self._ids(request.num_blocks), now_s=now_s,
        )  # fmt: skip

    def execute(self, now_s: float) -> float:
        """Take the step's copies; return for how many seconds the engine waits for them."""
        plan, loads = self.scheduling.take()
        if not plan and not loads:
            return 0.0
        num_blocks = {Direction.OUT: len(plan.out_blocks), Direction.IN: len(plan.in_blocks)}
        self.num_swapped_out_blocks += num_blocks[Direction.OUT]
        self.num_swapped_in_blocks += num_blocks[Direction.IN]
        costs = self.costs
        rates_s = {Direction.OUT: costs.out_block_s, Direction.IN: costs.in_block_s}
        seconds = {
            direction: costs.swap_fixed_s + rates_s[direction] * num if num else 0.0
            for direction, num in num_blocks.items()
        }
        self._copies = _Copies(num_blocks=num_blocks, seconds=seconds)
        wait_s = sum(seconds.values())
        if self.link is None:
            self._loading.update(loads)
            return wait_s
        return wait_s + self._pass_link(self.link, plan, [name for name, _ in loads], now_s)

    def finish(self, now_s: float) -> list[str]:
        """Tell the meter what the step's copies took; return the requests whose loads are done by now."""
        copies, self._copies = self._copies, None
        if copies is not None:
            for direction, num in copies.num_blocks.items():
                if num:
                    self.scheduling.meter.copied(direction, num, copies.seconds[direction])
        done = [name for name, done_s in self._loading.items() if done_s <= now_s]
        for name in done:
            del self._loading[name]
        return done

    def release(self, request: SimulatedRequest) -> None:
        """What the request has in host memory is of no use: its tokens are computed anew."""
        self.scheduling.planner.release(request.request_id)

    def forget(self, request_id: str) -> None:
        """The request has finished or was aborted."""
        self.scheduling.forget(request_id)

    def _pass_link(self, link: ThrottledLink, plan: SwapPlan, loading: list[str], now_s: float) -> float:
        """Send a step's copies over the host's link; return how long the engine waits for those out."""
        out_s = now_s
        for direction, num in ((Direction.OUT, len(plan.out_blocks)), (Direction.IN, len(plan.in_blocks))):
            if not num:
                continue
            passage = link.submit(direction, num * self._block_bytes, now_s)
            self.scheduling.meter.transferred(direction, num, passage.done_s - passage.start_s, shared=passage.shared)
            if direction is Direction.OUT:
                out_s = passage.done_s
            else:
                self._loading.update(dict.fromkeys(loading, passage.done_s))
        return out_s - now_s

    def _ids(self, num_blocks: int) -> range:
        first, self._next_block = self._next_block, self._next_block + num_blocks
        return range(first, first + num_blocks)
