"""The running requests of a simulated engine, in the order of admission, and the KV blocks that all its requests hold.

Rule: each of them decodes (`DecodeBatch`), or has the first step of its prefill under way, or is the one whose prefill takes
several steps, which is the last.
"""

from collections.abc import Iterable, Iterator

from cluster.decode_batch import DecodeBatch
from cluster.simulated_blocks import SimulatedBlocks
from cluster.simulated_request import SimulatedRequest, Status
from cluster.simulated_step import SimulatedSettings, Step


class RunningRequests:
    """Who runs, and on which blocks."""

    def __init__(self, settings: SimulatedSettings) -> None:
        self.blocks = SimulatedBlocks(settings.num_blocks, caching=settings.enable_prefix_caching)
        self.batch = DecodeBatch(settings.block_size)
        self.prefill: SimulatedRequest | None = None
        """The last request, where its prefill is not done with the step under way."""
        self._settings = settings
        self._requests: dict[SimulatedRequest, None] = {}
        self._num_admissions = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[SimulatedRequest]:
        return iter(self._requests)

    @property
    def last(self) -> SimulatedRequest:
        """The one that was admitted last."""
        return next(reversed(self._requests))

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self._settings.block_size)

    def num_missing_blocks(self) -> int:
        """Blocks that they want in the next step beyond the free ones; 0 when they all get theirs."""
        needed = self.batch.num_needed_blocks()
        if (request := self.prefill) is not None:
            budget = self._settings.max_num_batched_tokens - self.batch.num_requests
            num_new = min(request.num_tokens - request.num_computed, budget)
            needed += self.num_blocks_of(request.num_computed + num_new) - request.num_blocks
        return max(0, needed - self.blocks.num_free)

    def start(self, request: SimulatedRequest, num_new: int, num_blocks: int) -> None:
        """Let a request run that holds what was found of it, and compute so many tokens."""
        request.status = Status.RUNNING
        request.place = self._num_admissions
        self._num_admissions += 1
        self._requests[request] = None
        self.extend(request, num_new, num_blocks)

    def extend(self, request: SimulatedRequest, num_new: int, num_blocks: int) -> None:
        """Give a request the blocks to compute so many tokens."""
        self.blocks.take(num_blocks - request.num_blocks)
        request.num_blocks = num_blocks
        request.num_full_blocks = (request.num_computed + num_new) // self._settings.block_size
        self.blocks.cache(request.holding, request.num_full_blocks)
        is_done = request.num_computed + num_new == request.num_tokens
        assert self.prefill in (None, request), "two prefills that take several steps"
        self.prefill = None if is_done else request

    def deliver(self, request: SimulatedRequest) -> bool:
        """A prefill is done, with a token; return whether it was the last one, else the request decodes from now on."""
        request.num_output += 1
        if request.num_output < request.output_tokens:
            self.batch.join(request)
        return request.num_output == request.output_tokens

    def stop(self, request: SimulatedRequest) -> None:
        """Take a request out before its end; it still holds its blocks."""
        if request is self.prefill:
            self.prefill = None
        else:
            self.batch.leave(request)
        del self._requests[request]

    def end(self, request: SimulatedRequest) -> None:
        """A request, out of the batch, has all its tokens."""
        del self._requests[request]
        self.free(request)

    def free(self, request: SimulatedRequest) -> None:
        """Give back the blocks of a request that does not run."""
        self.blocks.free(request.holding, request.num_blocks, request.num_full_blocks)
        request.num_computed = request.num_blocks = request.num_full_blocks = 0

    def settle(self, *, after: int = 0) -> None:
        """Write down how far each request is, or will be `after` decodes from now; for decisions, reports and checks."""
        for request in self._requests:
            if request.end >= 0:
                self.batch.settle(request, after=after)

    def check(self, step: Step | None, holders: Iterable[SimulatedRequest]) -> None:
        """Assert that every request and block is in one place.

        Args:
            step: The one under way.
            holders: All others that hold blocks.
        """
        self.settle()
        scheduled = {request for request, _, _ in step.prefills} if step is not None else set()
        holding = []
        for request in self._requests:
            assert request.status is Status.RUNNING, f"{request.request_id} is {request.status}"
            num_blocks = request.num_blocks
            if request.end < 0:
                assert request in scheduled or request is self.prefill, f"{request.request_id} is forgotten"
            elif step is not None:
                num_blocks += self.batch.needs_block(request)  # the step has taken it
            holding.append((request.holding, num_blocks))
        num_decoding = sum(request.end >= 0 for request in self._requests)
        assert num_decoding == self.batch.num_requests, f"{num_decoding} decode, {self.batch.num_requests} in the batch"
        assert self.prefill in (None, *list(self._requests)[-1:]), "a prefill that is not the last"
        holding += [(request.holding, request.num_blocks) for request in holders]
        self.blocks.check(holding)
