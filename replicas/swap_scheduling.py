"""The scheduler's half of the KV connector: plans copies, keeps the clock of a throttled link, and tells the meter.

Rules:
- Plans are `SwapPlanner`'s; here are time and the link. No clock: times come in as values.
- Engine and simulator call the same object.
"""

from collections.abc import Sequence
from dataclasses import replace

from replicas.config import SwapConfig
from replicas.host_pool import HostBlockPool
from replicas.preemption_meter import PreemptionMeter
from replicas.swap_planner import SwapPlan, SwapPlanner
from replicas.throttled_link import Direction, LinkSettings, ThrottledLink


class SwapScheduling:
    """Plans copies, and keeps the clock of the throttled link."""

    def __init__(
        self,
        config: SwapConfig,
        num_slots: int,
        block_bytes: int,
        *,
        block_size: int,
        num_pool_blocks: int,
        asynchronous: bool,
    ) -> None:
        pool = HostBlockPool(num_slots, block_size=block_size, max_tenant_fraction=config.max_tenant_fraction)
        self.planner = SwapPlanner(pool)
        self.meter = PreemptionMeter()
        self._block_bytes, self._num_pool_blocks = block_bytes, num_pool_blocks
        self._link: ThrottledLink | None = None
        if config.throttled_link_bytes_per_s is not None:
            self._link = ThrottledLink(
                LinkSettings(
                    bytes_per_s=config.throttled_link_bytes_per_s,
                    latency_s=config.throttled_link_latency_s,
                    shared_ratio=config.throttled_link_shared_ratio,
                )
            )
        self._asynchronous = asynchronous or self._link is not None
        self._arrived_s: dict[str, float] = {}
        """When a swapped-out request's copy has left the link."""
        self.step_s = 0.0
        """What the last step took: a load that waits for the link no longer than that is planned."""
        self._cached: tuple[str, int] = ("", 0)
        """The request that vLLM asked for last, and how many of its tokens are in the prefix cache."""
        self._step = 0
        self._asked: dict[str, tuple[int, float]] = {}
        """In which step, and when, the link was not free for a request that wanted to load."""
        self._waited_s: dict[str, float] = {}
        """Seconds for which it was only the link that a request waited for, and not blocks."""
        self._loads: list[tuple[str, float]] = []

    def swap_out(
        self, request_id: str, *, tenant: str, num_tokens: int, block_ids: Sequence[int], now_s: float
    ) -> int | None:
        """Plan the copy of a victim's blocks; return how many are copied, or None when the host pool has no room."""
        num_blocks = self.planner.swap_out(request_id, tenant=tenant, num_tokens=num_tokens, block_ids=block_ids)
        if self._link is not None and num_blocks is not None:
            self._arrived_s[request_id] = self._transfer(self._link, Direction.OUT, num_blocks, now_s)
        return num_blocks

    def num_loadable_tokens(
        self, request_id: str, *, num_tokens: int, num_cached_tokens: int, now_s: float
    ) -> tuple[int | None, bool]:
        """Tokens that a waiting request can load beyond the cached ones (None: not yet), and whether asynchronously."""
        self._cached = (request_id, num_cached_tokens)
        num_loadable = self.planner.num_loadable_tokens(
            request_id, num_tokens=num_tokens, num_cached_tokens=num_cached_tokens
        )
        if num_loadable == 0 or not self._asynchronous:
            return num_loadable, False
        if self._link is None:
            return num_loadable, True
        step, asked_s = self._asked.pop(request_id, (0, now_s))
        if step == self._step - 1:
            self._waited_s[request_id] = self._waited_s.get(request_id, 0.0) + now_s - asked_s
        if self._arrived_s.get(request_id, 0.0) > now_s or self._link.queue_s(Direction.IN, now_s) > self.step_s:
            self._asked[request_id] = (self._step, now_s)
            return None, False
        return num_loadable, True

    def load(
        self, request_id: str, *, num_tokens: int, num_loaded_tokens: int, block_ids: Sequence[int], now_s: float
    ) -> None:
        """A waiting request has blocks: plan the load into them; a copy that is not wanted any more is released.

        Args:
            num_tokens: All that the request has.
            num_loaded_tokens: Those that are to be loaded, as `num_loadable_tokens` said, or 0.
        """
        asked_id, num_cached = self._cached
        self.meter.resumed(request_id, now_s, num_cached_tokens=num_cached if asked_id == request_id else 0)
        saved = self.planner.pool.get(request_id)
        if saved is None:
            return
        total = min(saved.num_tokens, num_tokens - 1)
        num_cached = total - num_loaded_tokens if num_loaded_tokens else 0
        self.planner.swap_in(
            request_id, num_cached_tokens=num_cached, num_loaded_tokens=num_loaded_tokens, block_ids=block_ids
        )
        num_blocks = self.planner.num_blocks(num_cached + num_loaded_tokens) - num_cached // self.planner.block_size
        self._arrived_s.pop(request_id, None)
        waited_s, done_s = self._waited_s.pop(request_id, 0.0), now_s
        if self._asynchronous and num_loaded_tokens:
            if self._link is not None:
                # The bytes are copied in this step, so the slots are free after it; only the clock goes on.
                done_s = self._transfer(self._link, Direction.IN, num_blocks, now_s)
            self._loads.append((request_id, done_s))
        self.meter.loading(
            request_id, num_blocks=num_blocks, num_pool_blocks=self._num_pool_blocks,
            held_s=done_s - now_s, waited_s=waited_s + done_s - now_s,
        )  # fmt: skip

    def _transfer(self, link: ThrottledLink, direction: Direction, num_blocks: int, now_s: float) -> float:
        """Let the simulated link carry blocks; return when it has, and let the meter know how long that takes."""
        transfer = link.submit(direction, num_blocks * self._block_bytes, now_s)
        if num_blocks:
            self.meter.transferred(direction, num_blocks, transfer.done_s - transfer.start_s, shared=transfer.shared)
        return transfer.done_s

    def change_link(self, factor: float) -> None:
        """Make the simulated link so many times as fast from now on."""
        assert self._link is not None, "there is no simulated link"
        self._link.settings = replace(self._link.settings, bytes_per_s=factor * self._link.settings.bytes_per_s)

    def lose(self, slots: list[int]) -> None:
        """What these slots hold is not what it should be: nobody is to load it, and nothing is told of what it cost."""
        if slots:
            for request_id in self.planner.copies_failed(slots):
                self.meter.forget(request_id)

    def forget(self, request_id: str) -> None:
        """The request has finished or was aborted."""
        self.planner.release(request_id)
        self.meter.forget(request_id)
        self._arrived_s.pop(request_id, None)
        self._asked.pop(request_id, None)
        self._waited_s.pop(request_id, None)

    def take(self) -> tuple[SwapPlan, list[tuple[str, float]]]:
        """Return the step's copies and asynchronous loads (request, when it counts as done), and start the next step's."""
        self._step += 1
        loads, self._loads = self._loads, []
        return self.planner.take_plan(), loads

    def queues_s(self, now_s: float) -> dict[Direction, float]:
        """Seconds until the throttled link is free, with the loads that wait for it; 0 without one."""
        if self._link is None:
            return dict.fromkeys(Direction, 0.0)
        queues_s = {direction: self._link.queue_s(direction, now_s) for direction in Direction}
        waiting = [saved for name in self._asked if (saved := self.planner.pool.get(name)) is not None]
        num_bytes = self._block_bytes * sum(len(saved.slots) for saved in waiting)
        queues_s[Direction.IN] += num_bytes / self._link.settings.bytes_per_s
        return queues_s
