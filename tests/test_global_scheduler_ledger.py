"""Goal: whatever happens to reports on their way, the ledger holds what was delivered, to the token, in bounded memory.

Method: a random cluster of replicas that deliver, report, restart and vanish; every report is kept and may arrive never,
late, twice, or in any order. At all times the ledger is at most what was delivered;
when the last totals have arrived it is equal.
"""

import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from cost_service.charges import NOTHING, Account, Served
from cost_service.service_messages import AccountReport, Report
from global_scheduler.ledger import KEPT_EPOCHS, Ledger, UnknownReplicaError

F = Account("f", "u")


def report(sequence: int, *, epoch: str = "e0", replica: str = "r0", **tokens: int) -> Report:
    accounts = {Account(name, ""): AccountReport(served=Served(num_output_tokens=num)) for name, num in tokens.items()}
    return Report(replica=replica, epoch=epoch, sequence=sequence, accounts=accounts)


def ledger_of(*replicas: str) -> Ledger:
    ledger = Ledger()
    for replica in replicas or ("r0",):
        ledger.add_replica(replica)
    return ledger


def test_a_merge_hands_on_what_is_new_and_nothing_twice() -> None:
    ledger = ledger_of()
    assert ledger.merge(report(0, f=10)) == ({Account("f"): Served(num_output_tokens=10)}, True)
    assert ledger.merge(report(1, f=15)) == ({Account("f"): Served(num_output_tokens=5)}, True)
    assert ledger.merge(report(1, f=15)) == ({}, False)
    assert ledger.merge(report(0, f=10)) == ({}, False)


def test_a_lost_report_is_made_up_by_the_next() -> None:
    ledger = ledger_of()
    ledger.merge(report(7, f=70))
    assert ledger.delivered("f") == Served(num_output_tokens=70)


def test_a_restarted_replica_counts_from_zero_and_adds() -> None:
    ledger = ledger_of()
    ledger.merge(report(5, f=100))
    ledger.merge(report(0, epoch="e1", f=30))
    assert ledger.merge(report(6, f=120)) == ({Account("f"): Served(num_output_tokens=20)}, True), "late, yet delivered"
    assert ledger.delivered("f") == Served(num_output_tokens=150)


def test_an_epoch_that_is_over_is_refused() -> None:
    ledger = ledger_of()
    for number in range(KEPT_EPOCHS + 1):
        ledger.merge(report(0, epoch=f"e{number}", f=10))
    assert ledger.merge(report(9, epoch="e0", f=999)) == ({}, False)
    assert ledger.num_refused == 1
    assert ledger.delivered("f").num_output_tokens == 10 * (KEPT_EPOCHS + 1)
    ledger.check()


def test_what_a_removed_replica_delivered_stays_and_counts_once() -> None:
    ledger = ledger_of()
    ledger.merge(report(0, f=10))
    ledger.remove_replica("r0")
    ledger.add_replica("r0")
    assert ledger.merge(report(1, f=12)) == ({}, False)
    assert ledger.delivered("f") == Served(num_output_tokens=10)


def test_an_unknown_replica_is_refused() -> None:
    with pytest.raises(UnknownReplicaError, match="'r9' is unknown"):
        ledger_of("r0").merge(report(0, replica="r9", f=1))


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (AccountReport(served=Served(num_output_tokens=2**53)), "num_output_tokens"),
        (AccountReport(served=Served(num_input_tokens=-1)), "num_input_tokens"),
        (AccountReport(served=NOTHING, num_waiting=-1), "num_waiting"),
        (AccountReport(served=NOTHING, reserved=float("nan")), "reserved"),
        (AccountReport(served=NOTHING, reserved=-0.5), "reserved"),
    ],
)
def test_an_impossible_number_is_refused_and_nothing_is_merged(line: AccountReport, field: str) -> None:
    ledger = ledger_of()
    good = AccountReport(served=Served(num_output_tokens=5))
    bad = Report(replica="r0", epoch="e0", sequence=0, accounts={Account("g"): good, F: line})
    with pytest.raises(ValueError, match=f"{field} of 'f'/'u' at 'r0'"):
        ledger.merge(bad)
    assert ledger.delivered("g") == NOTHING


def test_a_damaged_state_is_refused() -> None:
    ledger = ledger_of()
    ledger.merge(report(0, f=10))
    state = ledger.state()
    state["delivered"]["f"][2] += 1
    with pytest.raises(ValueError, match="totals of 'f' do not add up"):
        Ledger.restored(state)


def line_of(num: int, era: int) -> AccountReport:
    return AccountReport(served=Served(num_output_tokens=num), era=era)


def test_a_new_era_of_an_account_adds_to_what_it_had_and_a_late_word_of_the_old_one_counts_nothing() -> None:
    ledger = ledger_of()
    old, new = report(1, f=100), replace(report(2), accounts={Account("f"): line_of(30, 1)})
    for each in (old, new, old, new):
        ledger.merge(each)
    assert ledger.delivered("f") == Served(num_output_tokens=130)
    ledger.check()


def test_a_forgotten_account_leaves_nothing_behind_but_its_sum_however_late_its_old_words_come() -> None:
    ledger = ledger_of()
    old, end = report(1, f=100, g=5), replace(report(2), accounts={Account("f"): line_of(0, 1)})
    for each in (old, end, old, end):
        ledger.merge(each)
    lines = ledger.state()["replicas"]["r0"]["e0"]["lines"]
    assert [line[0] for line in lines] == ["g"]
    assert ledger.delivered("f") == Served(num_output_tokens=100)
    restored = Ledger.restored(json.loads(json.dumps(ledger.state())))
    for each in (old, replace(report(3), accounts={Account("f"): line_of(7, 1)}), old, end):
        restored.merge(each)
    assert restored.delivered("f") == Served(num_output_tokens=107)
    restored.check()


def test_a_report_that_forgets_one_account_and_names_another_for_the_first_time_counts_both() -> None:
    ledger = ledger_of()
    ledger.merge(report(1, f=100))
    accounts = {Account("f"): line_of(0, 1), Account("h"): line_of(9, 1)}
    ledger.merge(replace(report(2), accounts=accounts))
    assert ledger.delivered("h") == Served(num_output_tokens=9)


def test_tenants_whom_no_engine_knows_any_more_have_one_sum_together() -> None:
    ledger = Ledger(max_tenants=10)
    ledger.add_replica("r0")
    for number in range(100):
        name = f"t{number}"
        ledger.merge(report(2 * number, **{name: 3}))
        ledger.merge(replace(report(2 * number + 1), accounts={Account(name): line_of(0, number + 1)}))
    kept = ledger.state()["delivered"]
    assert len(kept) <= 11
    assert "t99" in kept, "who was served last is kept"
    assert ledger.forgotten.num_output_tokens + 3 * len(kept) == 300
    ledger.check()


class LedgerMachine(RuleBasedStateMachine):
    """Replicas deliver; the network does what it likes; the scheduler dies and comes back from its stored state."""

    replicas = st.sampled_from(["r0", "r1"])
    accounts = st.builds(Account, st.sampled_from("fg"), st.sampled_from("ab"))

    def __init__(self) -> None:
        super().__init__()
        self.ledger = ledger_of("r0", "r1")
        self.epochs = {"r0": 0, "r1": 0}
        self.totals: dict[tuple[str, int], dict[Account, Served]] = {}
        self.sequences: dict[tuple[str, int], int] = {}
        self.sent: list[Report] = []
        self.charged: dict[str, Served] = {}
        self.stored: tuple[str, dict[str, Served]] = (json.dumps(self.ledger.state()), {})

    @rule(replica=replicas, account=accounts, served=st.builds(Served, *[st.integers(0, 50)] * 4))
    def deliver(self, replica: str, account: Account, served: Served) -> None:
        totals = self.totals.setdefault((replica, self.epochs[replica]), {})
        totals[account] = totals.get(account, NOTHING).plus(served)

    @rule(replica=replicas)
    def send(self, replica: str) -> None:
        life = (replica, self.epochs[replica])
        self.sequences[life] = sequence = self.sequences.get(life, -1) + 1
        lines = {account: AccountReport(served=served) for account, served in self.totals.get(life, {}).items()}
        self.sent.append(Report(replica=replica, epoch=f"{life}", sequence=sequence, accounts=lines))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def receive_any(self, data: st.DataObject) -> None:
        self.merge(data.draw(st.sampled_from(self.sent)))

    @rule(replica=replicas)
    def restart(self, replica: str) -> None:
        self.epochs[replica] += 1

    @rule()
    def store(self) -> None:
        self.stored = (json.dumps(self.ledger.state()), dict(self.charged))

    @rule()
    def scheduler_dies(self) -> None:
        state, self.charged = self.stored[0], dict(self.stored[1])
        self.ledger = Ledger.restored(json.loads(state))

    def merge(self, report: Report) -> None:
        added, _ = self.ledger.merge(report)
        for account, served in added.items():
            assert min(served) >= 0
            self.charged[account.tenant] = self.charged.get(account.tenant, NOTHING).plus(served)

    def delivered(self, tenant: str) -> Served:
        parts = [
            served for totals in self.totals.values() for account, served in totals.items() if account.tenant == tenant
        ]
        return Served(*map(sum, zip(*parts, strict=True))) if parts else NOTHING

    @invariant()
    def conserved(self) -> None:
        self.ledger.check()
        for tenant in "fg":
            assert self.charged.get(tenant, NOTHING) == self.ledger.delivered(tenant)
            assert all(a <= b for a, b in zip(self.ledger.delivered(tenant), self.delivered(tenant), strict=True))

    def teardown(self) -> None:
        """Once the last totals of all lives have arrived, in any order, the ledger is what they delivered."""
        if max(self.epochs.values()) >= KEPT_EPOCHS:
            return
        for life, totals in reversed(self.totals.items()):
            lines = {account: AccountReport(served=served) for account, served in totals.items()}
            self.merge(replace(report(10**6, epoch=f"{life}", replica=life[0]), accounts=lines))
        for tenant in "fg":
            assert self.ledger.delivered(tenant) == self.delivered(tenant)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
