"""Goal: the benchmark of the fair queue measures a queue that stays as long as it says, of as many tenants.

Method: its own function, small.
"""

from cluster.bench_decision import queue_us


def test_adding_and_taking_out_are_measured_for_any_number_of_tenants() -> None:
    for num_waiting, num_tenants in ((1, 1), (50, 7)):
        added_us, taken_us = queue_us(num_waiting, num_tenants)
        assert 0.0 < added_us < 1e6
        assert 0.0 < taken_us < 1e6
