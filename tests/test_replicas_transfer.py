"""Goal: transfers that were seen tell how long they took and how much of it beside one of the other direction."""

import pytest

from replicas.throttled_link import Direction
from replicas.transfer import Transfer, TransferLog

OUT, IN = Direction.OUT, Direction.IN


def transfer(direction: Direction, start_s: float, end_s: float) -> Transfer:
    return Transfer(direction=direction, num_blocks=8, start_s=start_s, end_s=end_s)


def test_a_transfer_alone_shares_nothing() -> None:
    (one,) = TransferLog().add([transfer(OUT, 1.0, 3.0)])
    assert (one.direction, one.num_blocks, one.seconds, one.shared) == (OUT, 8, 2.0, 0.0)


def test_only_the_other_direction_counts_as_sharing() -> None:
    log = TransferLog()
    log.add([transfer(OUT, 0.0, 1.0), transfer(OUT, 1.0, 2.0)])
    (back,) = log.add([transfer(IN, 1.5, 3.5)])
    assert back.shared == pytest.approx(0.25)
    both = log.add([transfer(OUT, 4.0, 6.0), transfer(IN, 5.0, 6.0)])
    assert [one.shared for one in both] == pytest.approx([0.5, 1.0])


def test_what_took_no_time_tells_nothing() -> None:
    assert TransferLog().add([transfer(OUT, 1.0, 1.0)]) == []
