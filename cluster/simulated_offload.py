"""vLLM's own offloading to host memory (`kv_offloading_size`) around vLLM's own preemption, in a simulated engine.

Rules:
- Every full block is stored once the step that fills it is done; the copies of a step begin with the next step, those of a
  request as one transfer, and pass the link one after another beside the engine.
- A waiting request loads what it finds beyond the prefix cache, and takes part when that is there. It is passed over while
  its own stores are under way, or what it would load is being stored, or loaded by another one.
- A step waits for the stores of those whom it preempts, and for stores of ended requests whose blocks are taken again.
- vLLM keeps by default only prompts (`offload_prompt_only`); then all generated tokens of a victim are computed anew.
- Submitting a transfer takes nothing from the engine.

Source: vLLM 0.29 `distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py` and `worker.py`.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.simulated_blocks import Holding, SimulatedBlocks
from cluster.simulated_host_cache import HostCache
from cluster.simulated_request import SimulatedRequest
from replicas.throttled_link import Direction, ThrottledLink

if TYPE_CHECKING:
    from cluster.simulated_engine import SimulatedEngine
    from cluster.simulated_step import Step

MOST_IDLE_STEPS = 10
"""In which nobody is scheduled and nothing copied: two could come of results that are a step late."""


@dataclass(slots=True, eq=False)
class _Transfer:
    """Blocks of one request on their way."""

    name: str
    keys: list[Hashable]
    num_first: int = 0
    """The last of them is the last of so many blocks of its request."""
    done_s: float = math.inf
    """Infinite until it begins."""


@dataclass(slots=True)
class _Freed:
    """Blocks of a request that has ended, which others may take while they are still copied out."""

    holding: Holding
    num_full: int
    """First ones, which stay in the prefix cache until they are taken."""

    num_blocks: int
    least_empty: int
    """Free blocks without content since then, at least: those of this request were on top."""

    was_empty: int

    def has_lost(self, num_first: int, blocks: SimulatedBlocks) -> bool:
        """Whether one of the first blocks has been taken; the last ones are taken first."""
        self.least_empty = min(self.least_empty, blocks.num_empty)
        if num_first <= self.num_full:
            return blocks.find(self.holding, num_first).num_blocks < num_first
        return self.was_empty - self.least_empty > self.num_blocks - num_first


@dataclass(slots=True)
class _Known:
    """What the connector remembers of a request."""

    keys: list[Hashable] = field(default_factory=list)
    """Of its full blocks."""
    num_stored: int = 0
    """Blocks that were looked at to be stored."""
    num_cached: int = 0
    """Blocks that the prefix cache had when it was last looked up."""
    stores: dict[_Transfer, None] = field(default_factory=dict)
    """Under way, in this order."""


class SimulatedOffload:
    """The offloading connector of one simulated engine."""

    num_headroom_blocks = 0
    """vLLM keeps none free."""

    def __init__(
        self, *, num_host_blocks: int, block_size: int, block_bytes: int, link: ThrottledLink, caching: bool,
        prompt_only: bool = False,
    ) -> None:  # fmt: skip
        """Begin with nothing in host memory.

        Args:
            link: The way to host memory, beside the engine.
            caching: Whether the engine has a prefix cache.
            prompt_only: Whether generated tokens are left out, as is vLLM's default.
        """
        self.host = HostCache(num_host_blocks)
        self._block_size, self._block_bytes, self._link = block_size, block_bytes, link
        self._caching, self._prompt_only = caching, prompt_only
        self._known: dict[str, _Known] = {}
        self._stores: dict[_Transfer, None] = {}
        """Under way, or to begin with the next step; in this order."""
        self._loads: dict[_Transfer, None] = {}
        self._new_loads: list[_Transfer] = []
        self._being_loaded: set[Hashable] = set()
        self._preempted: list[str] = []
        self._ended: list[tuple[SimulatedRequest, _Known, int, _Freed]] = []
        """Since the last step, with the tokens to store."""
        self._fenced: dict[_Transfer, _Freed] = {}
        """Stores of requests that have ended: their blocks are free already."""
        self._blocks: SimulatedBlocks | None = None
        self._num_idle = 0
        self.num_stored_blocks = self.num_loaded_blocks = 0
        self.waited_s = 0.0
        """That steps waited for stores."""

    @property
    def first_load_s(self) -> float:
        """When the next transfer is done that somebody may wait for; infinite without any."""
        return min((one.done_s for one in (*self._loads, *self._stores)), default=math.inf)

    def make_room(self, engine: "SimulatedEngine", now_s: float) -> bool:
        """Nobody is preempted ahead; an engine that was idle learns what was done meanwhile."""
        self._blocks = engine.blocks
        self.end_copies(now_s)
        return False

    def take_away(self, engine: "SimulatedEngine", request: SimulatedRequest, now_s: float) -> None:
        """A victim's blocks are freed; its stores must be done before anybody writes into them."""
        request.recomputes += 1
        self._preempted.append(request.request_id)

    def num_loadable_tokens(
        self, request: SimulatedRequest, num_cached_tokens: int, now_s: float
    ) -> tuple[int | None, bool]:
        """Tokens to load beyond the cached ones (None: not yet), and whether asynchronously."""
        known = self._known_of(request.request_id)
        if known.stores:
            return None, False
        self._name_blocks(known, request)
        first = known.num_cached = num_cached_tokens // self._block_size
        found, pending = first, False
        while found < request.num_tokens // self._block_size and known.keys[found] in self.host:
            pending |= self.host.is_storing(known.keys[found])
            found += 1
        if self._caching and not self._being_loaded.isdisjoint(known.keys[first:found]):
            pending = True
        self.host.touch(known.keys)
        num_tokens = (found - first) * self._block_size
        return (None, False) if pending else (num_tokens, num_tokens > 0)

    def load(self, request: SimulatedRequest, num_loaded_tokens: int, now_s: float) -> None:
        """A waiting request has blocks: let what it has in host memory be loaded."""
        if not num_loaded_tokens:
            return
        known = self._known[request.request_id]
        known.num_stored = known.num_cached + num_loaded_tokens // self._block_size
        transfer = _Transfer(request.request_id, known.keys[known.num_cached : known.num_stored])
        self.host.begin_load(transfer.keys)
        self._being_loaded.update(transfer.keys)
        self._new_loads.append(transfer)
        self.num_loaded_blocks += len(transfer.keys)

    def copy(self, engine: "SimulatedEngine", step: "Step", now_s: float) -> float:
        """Let the step's copies begin; return for how many seconds the engine waits for some."""
        before = list(self._stores)
        awaited = [one for name in self._preempted for one in self._known_of(name).stores]
        self._preempted.clear()
        self._store_running(engine, step)
        self._store_ended()
        awaited += [one for one, freed in self._fenced.items() if freed.has_lost(one.num_first, engine.blocks)]
        for transfer in (*before, *awaited):
            self._begin_store(transfer, now_s)
        start_s = max((now_s, *(one.done_s for one in awaited)))
        for transfer in self._new_loads:
            self._begin(transfer, Direction.IN, start_s)
            self._loads[transfer] = None
        self._new_loads.clear()
        self.waited_s += start_s - now_s
        return start_s - now_s

    def end_copies(self, now_s: float) -> list[str]:
        """The step has ended; return the requests whose loads are done by now."""
        for transfer in [one for one in self._stores if one.done_s <= now_s]:
            del self._stores[transfer]
            self._fenced.pop(transfer, None)
            self.host.end_store(transfer.keys)
            if transfer.name in self._known:
                self._known[transfer.name].stores.pop(transfer, None)
        done = [one for one in self._loads if one.done_s <= now_s]
        for transfer in done:
            del self._loads[transfer]
            self.host.end_load(transfer.keys)
            self._being_loaded.difference_update(transfer.keys)
        return [transfer.name for transfer in done]

    def forget(self, request: SimulatedRequest) -> None:
        """The request has finished or was aborted; its last full blocks are stored with the next step."""
        known = self._known.pop(request.request_id, None)
        if known is None:
            return
        self._name_blocks(known, request)
        assert self._blocks is not None, "a request ends before a step has begun"
        caching, num_empty = self._blocks.caching, self._blocks.num_empty
        if request.num_output == request.output_tokens:  # its blocks are free already
            num_stored, num_tokens = request.num_tokens, request.num_tokens - 1
            num_blocks = -(-num_tokens // self._block_size)
            num_full = num_tokens // self._block_size if caching else 0
        else:
            num_stored, num_blocks = request.num_computed, request.num_blocks
            num_full = request.num_full_blocks if caching else 0
            num_empty += num_blocks - num_full
        freed = _Freed(request.holding, num_full, num_blocks, num_empty, num_empty)
        self._fenced.update(dict.fromkeys(known.stores, freed))
        self._ended.append((request, known, num_stored, freed))

    def learn(self, engine: "SimulatedEngine", step: "Step", ends_s: Sequence[float]) -> None:
        """An engine without requests goes on until its copies are done."""
        if not engine.num_requests:
            self._store_ended()
            for transfer in self._stores:
                self._begin_store(transfer, ends_s[-1])

    def nobody_runs(self, copies: bool) -> None:
        """A step has scheduled nobody though requests wait.

        Args:
            copies: Whether any are under way.

        Raises:
            ValueError: Nothing will ever change, as in vLLM: who waits for blocks stands before those who hold them.
        """
        self._num_idle = 0 if copies else self._num_idle + 1
        if self._num_idle > MOST_IDLE_STEPS:
            raise ValueError(
                "vLLM's offloading stands still with this workload: a request that does not fit waits before those that "
                "hold the blocks (vLLM issue 57841). Simulate it with more KV blocks or without offload."
            )

    def check(self) -> None:
        """Assert that transfers and host memory agree."""
        self.host.check()
        storing = {key for one in self._stores for key in one.keys}
        assert all(self.host.is_storing(key) for key in storing), "a block on its way out is not being stored"
        assert len(storing) == sum(len(one.keys) for one in self._stores), "a block is stored twice at once"
        assert self._fenced.keys() <= self._stores.keys(), "a store is fenced that is over"

    def _known_of(self, name: str) -> _Known:
        return self._known.setdefault(name, _Known())

    def _name_blocks(self, known: _Known, request: SimulatedRequest) -> None:
        """Name the full blocks of all tokens: those that others may share by what is in them."""
        keys = known.keys
        if not keys:
            keys += [(part.key, place) for part in request.holding.parts for place in range(part.num_blocks)]
        keys += [(request.request_id, place) for place in range(len(keys), request.num_tokens // self._block_size)]

    def _store_running(self, engine: "SimulatedEngine", step: "Step") -> None:
        """Plan stores of blocks that are full when the step is done."""
        late = {request: cached + num for request, cached, num in step.prefills}
        engine.running.settle()
        for request in engine.running:
            num_tokens = late.get(request, request.num_computed + 1 if request.end >= 0 else 0)
            known = self._known_of(request.request_id)
            if num_tokens // self._block_size > known.num_stored:
                self._name_blocks(known, request)
                self._store(request, known, min(num_tokens, request.num_tokens))

    def _store_ended(self) -> None:
        for request, known, num_tokens, freed in self._ended:
            if (transfer := self._store(request, known, num_tokens)) is not None:
                self._fenced[transfer] = freed
        self._ended.clear()

    def _store(self, request: SimulatedRequest, known: _Known, num_tokens: int) -> _Transfer | None:
        """Plan the store of what is new of a request's first tokens; without room it is tried again later."""
        if self._prompt_only:
            num_tokens = min(num_tokens, request.prompt_tokens)
        num_blocks = num_tokens // self._block_size
        new = self.host.begin_store(known.keys[known.num_stored : num_blocks])
        if new is None:
            return None
        known.num_stored = max(known.num_stored, num_blocks)
        if not new:
            return None
        self.host.touch(known.keys)
        transfer = _Transfer(request.request_id, new, num_blocks)
        known.stores[transfer] = self._stores[transfer] = None
        self.num_stored_blocks += len(new)
        return transfer

    def _begin_store(self, transfer: _Transfer, now_s: float) -> None:
        if transfer.done_s == math.inf:
            self._begin(transfer, Direction.OUT, now_s)

    def _begin(self, transfer: _Transfer, direction: Direction, now_s: float) -> None:
        transfer.done_s = self._link.submit(direction, len(transfer.keys) * self._block_bytes, now_s).done_s
