"""`python -m cluster costs`: what the cost service of a running application has learned, and what it predicts.

Costs of each kind of replica, and how well output lengths are predicted (metrics `adaptivellm_output_length_coverage` and
`adaptivellm_output_length_loss_ratio` say the latter of each ingress).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cluster.running import ask_actor, connected
from cost_service.result_file import write_json
from cost_service.service import ACTOR

COLUMNS = (("model", 28), ("hardware", 12), ("ranks", 6), ("block", 6), ("version", 8), ("errors of", 44))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="predict what it takes to recompute, or to copy, so many"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE (- for standard output)")
    parser.add_argument("--address", default="auto", help="Ray cluster (default: the one on this machine)")


def main(options: argparse.Namespace) -> int:
    """Print a line for each kind of replica; 0, or 2 with one sentence when there is nobody to ask."""
    if options.tokens is not None and options.tokens < 1:
        print("Error: --tokens must be above 0.", file=sys.stderr)
        return 2
    try:
        with connected(options.address):
            kinds = ask_actor(ACTOR, "status")
            lengths = ask_actor(ACTOR, "lengths_status")
            for kind in kinds if options.tokens else []:
                name = (kind["model"], kind["hardware"], kind["parallelism"], kind["block_size"])
                blocks = -(-options.tokens // kind["block_size"])
                kind["predicted_s"] = ask_actor(ACTOR, "predict", name, num_tokens=options.tokens, num_blocks=blocks)
    except LookupError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if options.json is None:
        print(table(kinds) + "\n\n" + lengths_line(lengths))
    else:
        write_json({"kinds": kinds, "output_lengths": lengths}, options.json)
    return 0


def table(kinds: list[dict[str, Any]]) -> str:
    """Render the kinds for a terminal."""
    lines = ["".join(name.rjust(width) for name, width in COLUMNS)]
    for kind in kinds:
        errors = ", ".join(f"{name} {error:.0%}" for name, error in kind["error_ratio"].items()) or "-"
        cells = [
            kind["model"][-26:],
            kind["hardware"],
            kind["parallelism"],
            kind["block_size"],
            kind["version"],
            errors,
        ]
        lines.append("".join(str(cell).rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
        for name, seconds in kind.get("predicted_s", {}).items():
            lines.append(f"{name:>28}: {1e3 * seconds:.3f} ms")
    return "\n".join(lines)


def lengths_line(lengths: dict[str, Any]) -> str:
    """Say how well output lengths are predicted (`cost_service.length_service.LengthQuality`)."""
    told = f"output lengths: {lengths['learned']} requests learned"
    if not lengths["judged"]:
        return told
    ratio = lengths["loss_ratio"]
    against = "" if ratio is None else f", loss {ratio:.2f} of that of the tenants' own quantiles"
    cut = lengths["cut"] / lengths["judged"]
    return f"{told}; {lengths['coverage']:.0%} within their 0.1-0.9 interval{against}; {cut:.0%} cut at their limit"
