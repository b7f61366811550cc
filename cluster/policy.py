"""`python -m cluster policy NAME`: let the engines of a running application follow another preemption policy.

They do from their next step on; nothing restarts. Engines that were started with `stock` have no scheduler of ours.
"""

import argparse
import sys
from typing import Any

from cluster.running import ask_replicas, connected

CHOICES = ("recompute", "swap", "adaptive")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preemption", choices=CHOICES, help="what happens to requests that must give way")
    parser.add_argument("--address", default="auto", help="Ray cluster (default: the one on this machine)")


def switch(preemption: str | None = None, admission: str | None = None) -> list[dict[str, Any]]:
    """Tell every replica of the cluster that this process has joined; what is None stays as it is there.

    Returns:
        The replicas' answers: `replica`, and whether its engine has `taken` it.

    Raises:
        LookupError: No application of ours is running.
    """
    # Replicas of the version before know nothing of admission.
    return ask_replicas("set_policy", preemption, *(() if admission is None else (admission,)))


def main(options: argparse.Namespace) -> int:
    """Tell every replica; 0, 1 when one did not take it, or 2 when there is nobody to tell."""
    try:
        with connected(options.address):
            answers = switch(options.preemption)
    except LookupError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for answer in sorted(answers, key=lambda one: str(one["replica"])):
        print(
            f"{answer['replica']}: {options.preemption if answer['taken'] else 'not taken: its engine does not answer'}"
        )
    return 0 if all(answer["taken"] for answer in answers) else 1
