"""KV blocks in host memory as vLLM's own offloading keeps them: found by content, evicted by last use.

Rules:
- A block is being stored, at rest, or read by loads. Only those at rest are evicted, the least recently used first.
- A store takes room for all of its new blocks or for none.

Source: vLLM 0.29 `v1/kv_offload/cpu/manager.py` (`CPUOffloadingManager`), `v1/kv_offload/cpu/policies/lru.py`.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

STORING = -1


class HostCache:
    """Which blocks are in host memory."""

    def __init__(self, num_blocks: int) -> None:
        """Begin empty, with room for so many."""
        self.num_blocks = num_blocks
        self.most_blocks = 0
        self._readers: dict[Hashable, int] = {}
        """Loads that read a block; `STORING` while it is written."""
        self._at_rest: OrderedDict[Hashable, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, key: object) -> bool:
        return key in self._readers

    def is_storing(self, key: Hashable) -> bool:
        """Whether a block is still being written."""
        return self._readers.get(key) == STORING

    def touch(self, keys: Sequence[Hashable]) -> None:
        """Use blocks; the first one counts as used last."""
        for key in reversed(keys):
            if key in self._at_rest:
                self._at_rest.move_to_end(key)

    def begin_store(self, keys: Sequence[Hashable]) -> list[Hashable] | None:
        """Take room for those that are not there; return them, or None where there is not enough."""
        new = [key for key in keys if key not in self._readers]
        num_evicted = len(new) - (self.num_blocks - len(self._readers))
        if num_evicted > 0:
            wanted = set(keys)
            evicted: list[Hashable] = []
            for key in self._at_rest:
                if len(evicted) == num_evicted:
                    break
                if key not in wanted:
                    evicted.append(key)
            if len(evicted) < num_evicted:
                return None
            for key in evicted:
                del self._at_rest[key], self._readers[key]
        self._readers.update(dict.fromkeys(new, STORING))
        self.most_blocks = max(self.most_blocks, len(self._readers))
        return new

    def end_store(self, keys: Iterable[Hashable]) -> None:
        """Blocks are written."""
        for key in keys:
            assert self._readers[key] == STORING, f"{key} is stored twice"
            self._readers[key] = 0
            self._at_rest[key] = None

    def begin_load(self, keys: Iterable[Hashable]) -> None:
        """Read blocks, which are not evicted meanwhile."""
        for key in keys:
            assert self._readers[key] != STORING, f"{key} is read before it is written"
            self._readers[key] += 1
            self._at_rest.pop(key, None)

    def end_load(self, keys: Iterable[Hashable]) -> None:
        """Blocks are read."""
        for key in keys:
            assert self._readers[key] > 0, f"{key} is read by nobody"
            self._readers[key] -= 1
            if not self._readers[key]:
                self._at_rest[key] = None

    def check(self) -> None:
        """Assert that every block is in one place."""
        assert len(self._readers) <= self.num_blocks, f"{len(self._readers)} blocks of {self.num_blocks}"
        at_rest = {key for key, num in self._readers.items() if num == 0}
        assert at_rest == set(self._at_rest), "a block at rest cannot be evicted, or another one can"
