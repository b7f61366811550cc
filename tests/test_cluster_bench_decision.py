"""Goal: the benchmark of decisions measures a queue that stays as long as it says, and messages that engines take.

Method: its own functions, small.
"""

from cluster.bench_decision import hearing_us, queue_us


def test_adding_and_taking_out_are_measured_for_any_number_of_tenants() -> None:
    for num_waiting, num_tenants in ((1, 1), (50, 7)):
        added_us, taken_us = queue_us(num_waiting, num_tenants)
        assert 0.0 < added_us < 1e6
        assert 0.0 < taken_us < 1e6


def test_what_an_engine_hears_is_read_and_taken_of_those_who_are_there_and_of_others() -> None:
    assert hearing_us(30, where="present") > 0.0
    assert hearing_us(30, where="absent") > 0.0
