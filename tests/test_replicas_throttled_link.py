"""Goal: the simulated link carries transfers in their order, each direction by itself or both over one bandwidth."""

import math

import pytest

from replicas.throttled_link import Direction, LinkSettings, ThrottledLink

OUT, IN = Direction.OUT, Direction.IN


def link(**settings: float) -> ThrottledLink:
    return ThrottledLink(LinkSettings(bytes_per_s=100.0, **settings))


def test_transfers_of_a_direction_wait_for_each_other_and_latency_does_not_occupy_it() -> None:
    one = link(latency_s=3.0)
    assert one.submit(OUT, 200, 10.0).done_s == 15.0
    assert one.queue_s(OUT, 11.0) == 1.0
    second = one.submit(OUT, 100, 11.0)
    assert (second.start_s, second.done_s) == (12.0, 16.0)
    assert one.queue_s(OUT, 20.0) == 0.0


def test_full_duplex_directions_do_not_see_each_other() -> None:
    one = link()
    assert one.submit(OUT, 200, 0.0).done_s == 2.0
    back = one.submit(IN, 400, 0.0)
    assert (back.done_s, back.shared) == (4.0, 0.5)


def test_over_one_bandwidth_what_goes_both_ways_at_once_is_slower() -> None:
    one = link(shared_ratio=1.0)
    one.submit(OUT, 200, 0.0)
    assert one.submit(IN, 100, 0.0).done_s == 2.0
    assert one.submit(IN, 100, 5.0).done_s == 6.0


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"latency_s": -1.0}, "latency_s"),
        ({"shared_ratio": 1.5}, "shared_ratio"),
        ({"shared_ratio": math.nan}, "shared_ratio"),
    ],
)
def test_settings_that_are_none_are_refused(settings: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        link(**settings)
