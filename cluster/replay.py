"""`python -m cluster replay FILE`: let the policies decide again what a decision log says that they decided."""

import argparse
import sys
from pathlib import Path

from replicas.decision_log import replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="decisions-….jsonl of a replica's decision_log_folder")


def main(options: argparse.Namespace) -> int:
    """Replay; 0, 1 when a decision differs, 2 when the file is no decision log."""
    try:
        with options.file.open("rb") as lines:
            result = replay(lines)
    except OSError as error:
        print(f"Error: {options.file} cannot be read: {error.strerror}.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"{result.num_decisions} decisions in {result.num_choices} choices, {len(result.differing_lines)} differ.")
    if result.differing_lines:
        print(f"Lines: {', '.join(map(str, result.differing_lines[:20]))}", file=sys.stderr)
        return 1
    return 0
