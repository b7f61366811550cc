"""Faults of host memory and its link, planted between a worker and its copier by chance from one seed."""

import random
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Any


class Fault(StrEnum):
    """What goes wrong with a copy."""

    ERROR_IN = "error on the way in"
    ERROR_OUT = "error on the way out"
    SHORT_READ = "short read"
    WRONG_BYTES = "wrong bytes in host memory"
    SLOW = "slow"
    NO_HOST_MEMORY = "out of host memory"


class FaultyCopier:
    """A copier of which a share of the calls go wrong; everything else is the real one's."""

    def __init__(self, copier: Any, fault: Fault, *, share: float, seed: int = 0) -> None:
        self._copier, self._fault, self._share = copier, fault, share
        self._rng = random.Random(seed)
        self.num_faults = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._copier, name)

    def copy_out(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        if not blocks:
            return
        if self._strikes(Fault.NO_HOST_MEMORY):
            raise MemoryError("no host memory")
        self._copier.copy_out(blocks, slots)
        if self._strikes(Fault.ERROR_OUT):
            raise RuntimeError("the copy out broke off")
        for slot in slots:
            if self._strikes(Fault.WRONG_BYTES):
                self._later_spoiled().append(slot)

    def checksum(self, slot: int) -> int:
        """The real one's; a slot that is to be spoiled is so right after its checksum was taken for the first time."""
        checksum: int = self._copier.checksum(slot)
        if slot in self._later_spoiled():
            self._later_spoiled().remove(slot)
            for host in self._copier._host_rows:
                host[slot, self._rng.randrange(host.shape[1])] ^= 0xFF
        return checksum

    def copy_in(self, slots: Sequence[int], blocks: Sequence[int], *, synchronous: bool) -> Any:
        if self._strikes(Fault.ERROR_IN):
            raise OSError("the copy in failed")
        if self._strikes(Fault.SHORT_READ):
            half = len(slots) // 2
            self._copier.copy_in(slots[:half], blocks[:half], synchronous=synchronous)
            raise OSError(f"{half} of {len(slots)} blocks read")
        if self._strikes(Fault.SLOW):
            time.sleep(0.02)
        return self._copier.copy_in(slots, blocks, synchronous=synchronous)

    def _strikes(self, fault: Fault) -> bool:
        strikes = self._fault is fault and self._rng.random() < self._share
        self.num_faults += strikes
        return strikes

    def _later_spoiled(self) -> list[int]:
        spoiled: list[int] = self.__dict__.setdefault("_spoiled", [])
        return spoiled
