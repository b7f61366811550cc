"""`python -m cluster policy [NAME] [--admission NAME]`: let the engines of a running application follow other policies.

They do from their next step on; nothing restarts. Engines that were started with vLLM's own scheduler (`stock` with
`first-come`) take no message.
"""

import argparse
import sys

from cluster.running import ask_replicas, connected
from replicas.fair_queue import Admission

CHOICES = ("recompute", "swap", "adaptive")
ADMISSIONS = tuple(admission.value for admission in Admission)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preemption", nargs="?", choices=CHOICES, help="what happens to requests that must give way")
    parser.add_argument("--admission", choices=ADMISSIONS, help="who of those who wait is admitted next")
    parser.add_argument("--address", default="auto", help="Ray cluster (default: the one on this machine)")


def main(options: argparse.Namespace) -> int:
    """Tell every replica; 0, 1 when one did not take it, or 2 when there is nobody to tell."""
    names = [name for name in (options.preemption, options.admission) if name is not None]
    if not names:
        print("Error: name a preemption policy, or an order of admission with --admission.", file=sys.stderr)
        return 2
    try:
        with connected(options.address):
            answers = ask_replicas("set_policy", options.preemption, options.admission)
    except LookupError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for answer in sorted(answers, key=lambda one: str(one["replica"])):
        told = ", ".join(names) if answer["taken"] else "not taken: its engine does not answer"
        print(f"{answer['replica']}: {told}")
    return 0 if all(answer["taken"] for answer in answers) else 1
