"""Goal: what an engine reports is counted once, under labels that are few.

Method: totals one after the other into the metrics of a replica, whose counts and values are read where Ray takes them over.
"""

import msgspec

from cost_service.tenant_labels import OTHERS, UNNAMED
from replicas.messages import EngineTotals
from replicas.serve_engine_metrics import COUNTED, EngineMetrics
from tests.test_replicas_messages import TOTALS_FIELDS

TOTALS = EngineTotals(**TOTALS_FIELDS)


def totals(**change: object) -> EngineTotals:
    return msgspec.structs.replace(TOTALS, **change)


class Counts:
    """What is counted, by metric and its last label."""

    def __init__(self, replica: EngineMetrics) -> None:
        self.of: dict[tuple[str, ...], float] = {}
        for name, counter in replica._counters.items():
            counter.inc = lambda amount, tags, name=name: self._add(name, amount, tags)

    def _add(self, name: str, amount: float, tags: dict[str, str]) -> None:
        key = (name.removeprefix("adaptivellm_"), *tags.values())
        self.of[key] = self.of.get(key, 0.0) + max(0.0, amount)


def test_every_counter_follows_a_field_of_the_totals_that_grows() -> None:
    fields = [field for _, field, _ in COUNTED]
    assert set(fields) <= set(EngineTotals.__struct_fields__)
    assert len(set(fields)) == len(fields)


def test_totals_are_counted_once_through_repeats_and_another_life_of_the_engine() -> None:
    replica = EngineMetrics("r")
    counts = Counts(replica)
    reports = [
        totals(epoch="one", swaps=2, output_tokens=10),
        totals(epoch="one", swaps=2, output_tokens=10),
        totals(epoch="one", swaps=5, output_tokens=30),
        totals(epoch="two", swaps=1, output_tokens=4),
    ]
    before = None
    for now in reports:
        replica.update(before, now)
        before = now
    assert counts.of["preemptions_total", "swap"] == 6
    assert counts.of["output_tokens_total",] == 34


def test_what_waits_is_shown_by_tenant_and_adds_up_to_all() -> None:
    replica = EngineMetrics("r")
    backlog = {"": 5, **{f"t{number}": 100 + number for number in range(150)}}
    whole = sum(backlog.values()) + 40
    waiting = replica._waiting_tokens(totals(backlog=backlog, num_waiting_tokens=whole))
    assert len(waiting) == 101, "a hundred labels, and that of the others"
    assert sum(waiting.values()) == whole
    assert waiting["t149"] == 249
    assert waiting[OTHERS] >= 40
    assert UNNAMED not in waiting, "the least of all"
    assert replica._waiting_tokens(totals(backlog={}, num_waiting_tokens=0)) == {OTHERS: 0.0}
