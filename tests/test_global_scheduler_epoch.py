"""Goal: a life of a replica adds what is new of a total, once, part by part, whatever order totals come in.

Method: examples, and random orders of totals of which the largest parts must be what was added in all.
"""

from hypothesis import given
from hypothesis import strategies as st

from cost_service.charges import NOTHING, Account, Served
from cost_service.service_messages import AccountReport
from global_scheduler.epoch import Epoch, add_to

F, V = Account("f", "u"), Account("f", "v")
TOTALS = st.lists(st.builds(Served, *[st.integers(0, 9)] * 4), max_size=8)


@given(TOTALS, TOTALS)
def test_what_is_added_in_all_is_the_largest_of_every_part(mine: list[Served], others: list[Served]) -> None:
    epoch, added = Epoch(), NOTHING
    for account, totals in ((F, mine), (V, others)):
        for total in totals:
            more = epoch.raise_to(account, total)
            assert more is None or (min(more) >= 0 and more != NOTHING)
            added = added.plus(more or NOTHING)
    expected = NOTHING
    for totals in (mine, others):
        expected = expected.plus(Served(*map(max, zip(*totals, strict=True))) if totals else NOTHING)
    assert added == epoch.tenants.get("f", NOTHING) == expected


def test_a_forgotten_account_takes_its_total_along_and_leaves_its_tenants_other_users() -> None:
    epoch = Epoch()
    for account, num in ((F, 10), (V, 3)):
        epoch.raise_to(account, Served(num_output_tokens=num))
    assert epoch.forget(F) == Served(num_output_tokens=10)
    assert epoch.tenants == {"f": Served(num_output_tokens=3)}
    assert epoch.forget(V).num_output_tokens == 3
    assert epoch.tenants == epoch.totals == {}


def test_who_neither_waits_nor_runs_nor_has_anything_reserved_is_not_present() -> None:
    epoch = Epoch()
    for line in (
        AccountReport(served=NOTHING, num_waiting=1),
        AccountReport(served=NOTHING, num_running=1),
        AccountReport(served=NOTHING, reserved=0.5),
    ):
        epoch.note(F, line)
        assert epoch.present == {F: line}
    epoch.note(F, AccountReport(served=NOTHING))
    assert epoch.present == {}


def test_who_was_added_to_last_stands_last() -> None:
    sums: dict[str, Served] = {}
    for tenant in "fgf":
        add_to(sums, tenant, Served(num_output_tokens=1))
    assert list(sums) == ["g", "f"]
    assert sums["f"].num_output_tokens == 2
