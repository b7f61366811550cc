"""What the commands of benchmarks have in common: how they run, end and are cut short, and what they tell of the machine.

Rules:
- One sentence and status 2 for what is wrong with an option, 1 when something failed or a benchmark's own demand was missed.
- Ctrl-C and SIGTERM end everything that was started. What was measured by then is kept, marked `partial`, where the
  benchmark has something to keep; its parts stay, so that the same command goes on with them.
- No key, host or path stands in what is written.
"""

import argparse
import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from cluster.bench_runs import Say
from cluster.synthetic import SCHEME

PRIVATE = {"--key": "KEY", "--serve": "URL", "--address": "ADDRESS"}
"""Options whose values are not told, and what stands for them."""


def run_command(
    options: argparse.Namespace,
    work: Callable[[Path, Say], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
    *,
    described: Callable[[argparse.Namespace], str],
) -> int:
    """Run a benchmark in a scratch folder, print its table, write `--json`; return the exit status of `main`.

    With `--describe` it prints what the workload is instead.

    Args:
        work: Measures. It may return a report that is `partial`: it was interrupted then.
        described: Says what the workload of the options is.
    """
    started_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started_s:6.1f} s] {text}", file=sys.stderr, flush=True)

    def carried_out() -> int:
        if options.describe:
            print(described(options))
            return 0
        check_json_file(options.json)
        with tempfile.TemporaryDirectory(prefix="adaptivellm-") as scratch, _terminated_like_interrupted():
            report = work(Path(scratch), say)
        print(render(report))
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
            if "partial" not in report:
                cast(Path, parts_file(options.json)).unlink(missing_ok=True)
        return status_of(report)

    try:
        return said(carried_out, interrupted="Interrupted; all engines are ended.")
    except RuntimeError as error:  # an engine or a server has failed
        print(f"Error: {error}", file=sys.stderr)
        return 1


def said(work: Callable[[], int], *, interrupted: str = "Interrupted.") -> int:
    """Do a command's work; return its exit status, with one sentence on standard error for what it raises.

    2 for what is wrong with an option or a file, 130 when it was interrupted. Whatever else is raised goes on.
    """
    try:
        return work()
    except OSError as error:
        print(f"Error: {error.filename or 'A file'} cannot be used: {error.strerror}.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def status_of(report: dict[str, Any]) -> int:
    """The exit status of a benchmark that has a report, with a sentence on standard error for every one but 0."""
    if "partial" in report:
        print(f"Interrupted; {report['partial_repeats']} whole repeats were measured.", file=sys.stderr)
        return 130
    if any(arm.get("requests_with_other_tokens") for arm in report.get("arms", {}).values()):
        print("Error: tokens differ from those of stock with ample memory.", file=sys.stderr)
        return 1
    for sentence in report.get("regressions", ()):
        print(f"Error: {sentence}", file=sys.stderr)
    return 1 if report.get("regressions") else 0


def parts_file(result: Path | None) -> Path | None:
    """Where the parts of an unfinished benchmark are kept; nowhere without a result file."""
    return result and result.with_name(f"{result.name}.parts")


def check_json_file(path: Path | None) -> None:
    """Refuse a result file that cannot be written, before anything is measured.

    Raises:
        ValueError: It is a folder, or in none that exists.
    """
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError("--json must name a file in a folder that exists: make the folder or name another one.")


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def command_line(arguments: Sequence[str] | None = None) -> str:
    """What was run, with files by their names alone and without what is private.

    Args:
        arguments: Of the command; None: this process's own.
    """
    told, before = ["python -m cluster"], ""
    for text in sys.argv[1:] if arguments is None else arguments:
        option, equals, _ = text.partition("=")
        if before in PRIVATE:
            told.append(PRIVATE[before])
        elif equals and option in PRIVATE:
            told.append(f"{option}={PRIVATE[option]}")
        else:
            told.append(text if SCHEME in text else re.sub("[^:=]*/", "", text))  # streams have slashes of their own
        before = text
    return " ".join(told)


def machine_facts() -> dict[str, Any]:
    """What a reader must know of the machine; neither its name nor a path."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load_average_at_start": os.getloadavg()[0],
    }
