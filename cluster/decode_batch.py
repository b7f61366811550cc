"""The running requests of a simulated engine that compute one token in every step, advanced all together.

Method: what grows with every step is kept relative to the number of steps that the batch has taken, so that a step, or many,
cost the same whatever the number of requests. Requests are told apart only when they join, leave or end.
"""

import heapq

from cluster.simulated_request import SimulatedRequest


class DecodeBatch:
    """Requests with all tokens computed but the newest one."""

    def __init__(self, block_size: int) -> None:
        self.num_requests = 0
        self.num_steps = 0
        """Taken so far."""
        self._block_size = block_size
        self._sum_starts = 0
        self._num_at_phase = [0] * block_size
        """Requests by their start modulo the block size: those of one phase need a block in the same steps."""
        self._ends: list[tuple[int, int, SimulatedRequest]] = []
        """Heap by last step; requests that have left stay until they come up."""

    @property
    def num_context_tokens(self) -> int:
        """KV tokens that the next step reads, its own included."""
        return self._sum_starts + self.num_requests * (self.num_steps + 1)

    def join(self, request: SimulatedRequest) -> None:
        """Let a request take part from the next step on; it has at least one token to go."""
        assert request.num_computed == request.num_tokens - 1, f"{request.request_id} is not done with its prefill"
        request.start = request.num_computed - self.num_steps
        request.end = self.num_steps + request.output_tokens - request.num_output
        assert request.end > self.num_steps, f"{request.request_id} has no token to go"
        self.num_requests += 1
        self._sum_starts += request.start
        self._num_at_phase[request.start % self._block_size] += 1
        heapq.heappush(self._ends, (request.end, request.place, request))

    def leave(self, request: SimulatedRequest) -> None:
        """Settle a request's numbers; it is no part of the batch any more."""
        self.settle(request)
        request.end = -1
        self.num_requests -= 1
        self._sum_starts -= request.start
        self._num_at_phase[request.start % self._block_size] -= 1

    def settle(self, request: SimulatedRequest, *, after: int = 0) -> None:
        """Write down how far a request of the batch is, or will be `after` steps from now."""
        request.num_computed = request.start + self.num_steps + after
        request.num_output = request.num_computed + 1 - request.prompt_tokens
        request.num_blocks = -(-request.num_computed // self._block_size)
        request.num_full_blocks = request.num_computed // self._block_size

    def needs_block(self, request: SimulatedRequest) -> bool:
        """Whether the request's last block is full."""
        return (request.start + self.num_steps) % self._block_size == 0

    def num_needed_blocks(self, num_steps: int = 1, *, after: int = 0) -> int:
        """KV blocks that all need for so many steps, `after` steps from now."""
        block_size, at_phase, first = self._block_size, self._num_at_phase, self.num_steps + after
        if num_steps == 1:
            return at_phase[-first % block_size]
        cycles, rest = divmod(num_steps, block_size)
        return cycles * self.num_requests + sum([at_phase[-step % block_size] for step in range(first, first + rest)])

    def num_steps_within(self, num_blocks: int, *, after: int = 0) -> int:
        """Steps for which so many blocks are enough, `after` steps from now."""
        assert self.num_requests, "any number"
        cycles, left = divmod(num_blocks, self.num_requests)
        num_steps, first = cycles * self._block_size, self.num_steps + after
        while (needed := self._num_at_phase[-(first + num_steps) % self._block_size]) <= left:
            left -= needed
            num_steps += 1
        return num_steps

    @property
    def num_steps_to_end(self) -> int:
        """Steps until the first request has all its tokens."""
        while self._ends[0][0] != self._ends[0][2].end:
            heapq.heappop(self._ends)
        return self._ends[0][0] - self.num_steps

    def advance(self, num_steps: int) -> list[SimulatedRequest]:
        """Take steps, none beyond the first end; return those who have all their tokens, in the order of running."""
        self.num_steps += num_steps
        ended = []
        while self._ends and self._ends[0][0] <= self.num_steps:
            end, _, request = heapq.heappop(self._ends)
            if end == request.end:
                assert end == self.num_steps, f"{request.request_id} has run beyond its end"
                self.leave(request)
                ended.append(request)
        return ended
