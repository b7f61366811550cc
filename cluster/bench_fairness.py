"""`python -m cluster bench-fairness-actor`: how many reports of replicas the fairness scheduler's object merges on one core.

Method: every report is bytes, decoded, checked, merged and answered in bytes (JSON), for each number of replicas in turn; in
each, `CHANGED` accounts have changed, drawn alike from all tenants, and those that came first leave while more than
`--present` are there. Where all tenants are at every replica (`--present` as many as `--tenants`) a replica is told of all
that the others report in an interval: that is the worst for an answer. Processor time of the object alone; memory of the
whole process, the replicas' own totals included.
"""

import argparse
import gc
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cost_service.charges import Account, Served
from cost_service.result_file import write_json
from cost_service.service_messages import UNTOLD, AccountReport, Report, Version
from global_scheduler.fair_share import FairShare

CHANGED = 20
"""Accounts in a report."""

REPLICAS = (1, 16, 64, 256)
INTERVAL_S = 0.1
"""Between two reports of a replica, as in the product: what a second of them asks for."""

Line = tuple[Account, AccountReport]


class _Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A report as bytes carry it: JSON has no keys but strings."""

    replica: str
    epoch: str
    sequence: int
    since: Version
    accounts: list[Line]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--tenants", type=int, default=10_000, help="tenants that take turns (default: 10000)")
    parser.add_argument("--present", type=int, default=200, help="tenants that are at a replica at once (default: 200)")
    parser.add_argument("--reports", type=int, default=4_000, help="reports per number of replicas (default: 4000)")
    parser.add_argument(
        "--memory-reports", type=int, default=100_000, help="reports after which memory is read; 0: none"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def main(options: argparse.Namespace) -> int:
    """Measure and print; 0, 2 for a wrong option, 130 when interrupted."""
    if min(options.tenants, options.present) < CHANGED or options.reports < 1 or options.memory_reports < 0:
        print(f"Error: --tenants must be at least {CHANGED}, --present too, --reports at least 1.", file=sys.stderr)
        return 2
    figures: list[dict[str, float]] = []
    print(f"{'replicas':>8}{'reports/s':>11}{'wanted/s':>10}{'tenants/answer':>16}{'bytes/answer':>14}")
    try:
        for num_replicas in REPLICAS:
            load = _Load(num_replicas, options.tenants, options.present)
            figures.append(one := measure(load, num_replicas, options.reports))
            print(
                f"{num_replicas:>8}{one['reports_per_s']:>11.0f}{num_replicas / INTERVAL_S:>10.0f}"
                f"{one['tenants_per_answer']:>16.1f}{one['bytes_per_answer']:>14.0f}", flush=True,
            )  # fmt: skip
        if options.memory_reports:
            load = _Load(16, options.tenants, options.present)
            figures.append(memory := held(load, options.memory_reports))
            print(
                f"after {options.memory_reports} reports of 16 replicas: {memory['mib_at_last']:.0f} MiB,"
                f" {memory['mib_at_half']:.0f} MiB after half of them; peak of all runs {memory['peak_mib']:.0f} MiB"
            )
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    if options.json:
        write_json({"benchmark": "fairness-actor", "runs": figures}, options.json)
    return 0


def measure(load: "_Load", num_replicas: int, num_reports: int) -> dict[str, float]:
    """Reports a second of processor time, and what an answer holds."""
    share = _share(num_replicas)
    share.take(load.first())
    for _ in load.run(share, 2 * num_replicas):  # so that every replica has been told all, once
        pass
    gc.collect()
    seconds, num_shares, num_bytes = 0.0, 0, 0
    for took_s, shares, size in load.run(share, num_reports):
        seconds, num_shares, num_bytes = seconds + took_s, num_shares + shares, num_bytes + size
    share.check()
    return {
        "replicas": num_replicas, "reports_per_s": num_reports / seconds,
        "tenants_per_answer": num_shares / num_reports, "bytes_per_answer": num_bytes / num_reports,
    }  # fmt: skip


def held(load: "_Load", num_reports: int) -> dict[str, float]:
    """Memory of the process with 16 replicas at half-time and at last, and its peak, in MiB."""
    share = _share(16)
    share.take(load.first())
    resident = []
    for number, _ in enumerate(load.run(share, num_reports)):
        if number + 1 in (num_reports // 2, num_reports):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * resource.getpagesize() / 2**20)
    share.check()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"mib_at_half": resident[0], "mib_at_last": resident[-1], "peak_mib": peak}


def _share(num_replicas: int) -> FairShare:
    share = FairShare()
    for number in range(num_replicas):
        share.add_replica(f"r{number}")
    return share


class _Load:
    """Replicas in turn, each with the totals that its engine would have."""

    def __init__(self, num_replicas: int, num_tenants: int, num_present: int) -> None:
        self._chance = random.Random(1)
        self._accounts = [Account(f"tenant-{number:06}", f"user-{number:06}") for number in range(num_tenants)]
        self._totals: list[dict[int, list[int]]] = [{} for _ in range(num_replicas)]
        self._versions = [UNTOLD] * num_replicas
        self._num_present = num_present
        self._here: list[deque[int]] = [deque() for _ in range(num_replicas)]
        self._sequence = 0
        self._encoder, self._decoder = msgspec.json.Encoder(), msgspec.json.Decoder(_Message)

    def first(self) -> Report:
        """All tenants wait at the first replica."""
        lines = {account: AccountReport(served=Served(), num_waiting=1) for account in self._accounts}
        return Report(replica="r0", epoch="e", sequence=0, accounts=lines)

    def run(self, share: FairShare, num_reports: int) -> Iterator[tuple[float, int, int]]:
        """Seconds of processor time that each report took, and what its answer held: tenants and bytes."""
        for _ in range(num_reports):
            self._sequence += 1
            number = self._sequence % len(self._totals)
            data = self._encoder.encode(self._message(number))
            began_ns = time.process_time_ns()
            message = self._decoder.decode(data)
            report = Report(
                replica=message.replica, epoch=message.epoch, sequence=message.sequence, accounts=dict(message.accounts)
            )
            share.take(report)
            answer = share.answer(message.replica, message.epoch, since=message.since, named=report.accounts)
            answered = self._encoder.encode(answer)
            took_ns = time.process_time_ns() - began_ns
            self._versions[number] = answer.version
            yield took_ns * 1e-9, len(answer.shares), len(answered)

    def _message(self, number: int) -> _Message:
        here, most = self._here[number], len(self._accounts)
        num_leaving = CHANGED // 2 if len(here) + CHANGED > self._num_present else 0
        leaving = {here.popleft() for _ in range(min(num_leaving, len(here)))}
        drawn = self._chance.sample(range(most), CHANGED)
        coming = [index for index in drawn if index not in leaving][: CHANGED - len(leaving)]
        if self._num_present < most:
            here += coming
        lines = [(self._accounts[index], self._line(number, index, leaves=True)) for index in leaving]
        lines += [(self._accounts[index], self._line(number, index, leaves=False)) for index in coming]
        return _Message(
            replica=f"r{number}", epoch="e", sequence=self._sequence, since=self._versions[number], accounts=lines
        )

    def _line(self, number: int, index: int, *, leaves: bool) -> AccountReport:
        total, chance = self._totals[number].setdefault(index, [0, 0, 0, 0]), self._chance
        for part, most in enumerate((200, 20, 100, 5000)):
            total[part] += chance.randrange(most)
        if leaves:
            return AccountReport(served=Served(*total))
        return AccountReport(
            served=Served(*total), num_waiting=chance.randrange(3), num_running=1, reserved=float(chance.randrange(3))
        )
