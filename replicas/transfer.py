"""Transfers between device and host memory that were seen to run beside the engine, and how much they shared the link."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from replicas.throttled_link import Direction

REMEMBERED = 64
"""Transfers that a new one is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One transfer of KV blocks, and when it ran."""

    direction: Direction
    num_blocks: int
    start_s: float
    end_s: float

    def beside_s(self, other: "Transfer") -> float:
        """Seconds for which both ran."""
        return max(0.0, min(self.end_s, other.end_s) - max(self.start_s, other.start_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What a transfer tells of its link."""

    direction: Direction
    num_blocks: int
    seconds: float
    shared: float
    """Share of its time for which the other direction carried something too."""


class TransferLog:
    """The newest transfers of one device; those of one direction never overlap."""

    def __init__(self) -> None:
        self._known: deque[Transfer] = deque(maxlen=REMEMBERED)

    def add(self, transfers: Iterable[Transfer]) -> Sequence[Carried]:
        """Take note of transfers that are complete; what is still under way on the other side is not counted."""
        transfers = list(transfers)
        self._known.extend(transfers)
        return [
            Carried(
                direction=one.direction, num_blocks=one.num_blocks, seconds=one.end_s - one.start_s,
                shared=self._shared(one),
            )
            for one in transfers if one.end_s > one.start_s
        ]  # fmt: skip

    def _shared(self, transfer: Transfer) -> float:
        beside_s = sum(transfer.beside_s(one) for one in self._known if one.direction is not transfer.direction)
        return min(1.0, beside_s / (transfer.end_s - transfer.start_s))
