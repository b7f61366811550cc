"""What the commands of benchmarks have in common: how they run, end and are cut short, and what they tell of the machine.

Rules:
- One sentence and status 2 for what is wrong with an option, 1 when something failed or a benchmark's own demand was missed.
- Ctrl-C and SIGTERM end everything that was started. What was measured by then is kept, marked `partial`, where the
  benchmark has something to keep; its parts stay, so that the same command goes on with them.
- No key, host or path stands in what is written.
"""

import argparse
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from cluster.bench_runs import Say
from cluster.synthetic import SCHEME
from cluster.workload_summary import Summary
from cost_service.result_file import write_json

Result = TypeVar("Result")

PRIVATE = {"--key": "KEY", "--serve": "URL", "--address": "ADDRESS"}
"""Options whose values are not told, and what stands for them."""

OUTPUTS = ("--json", "--plot", "--save-baseline")
"""Options that name a file to write: no part of what was run."""

_PATH_IN_JSON = re.compile(r'"([^"]*/[^"]*)"')


def run_command(
    options: argparse.Namespace,
    work: Callable[[Path, Say], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
    *,
    described: Callable[[argparse.Namespace], Summary],
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
            return tell(described(options), options.json)
        with tempfile.TemporaryDirectory(prefix="adaptivellm-") as scratch, terminated_like_interrupted():
            report = work(Path(scratch), say)
        print(render(report))
        if options.json:
            write_json(report, options.json)
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


def until_interrupted(work: Mapping[str, Callable[[], Result]]) -> tuple[dict[str, Result], dict[str, Any]]:
    """Do pieces of work in turns; return what came of them by name, and for the report whether some are missing.

    Raises:
        KeyboardInterrupt: None was done.
    """
    done: dict[str, Result] = {}
    try:
        for name, one in work.items():
            done[name] = one()
    except KeyboardInterrupt:
        if not done:
            raise
        return done, partial_of(done, work)
    return done, {}


def partial_of(done: Collection[str], asked: Collection[str]) -> dict[str, Any]:
    """What a report says of work that was interrupted."""
    return {"partial": True, "partial_done": len(done), "partial_of": len(asked)}


def tell(workload: Summary, target: Path | None) -> int:
    """Say what a workload is, and write it to the file of `--json`; return the exit status."""
    print(workload.text())
    if target is not None:
        write_json({"described": workload.figures()}, target)
    return 0


@contextmanager
def named_as_options(*fields: str, **options: str) -> Iterator[None]:
    """Let what is wrong with a setting name the option that it came from.

    Args:
        fields: Settings whose options have their names.
        options: Those of others.
    """
    names = {field: f"--{field.replace('_', '-')}" for field in fields} | options
    try:
        yield
    except ValueError as error:
        pattern = rf"(?<![-\w])({'|'.join(names)})(?!\w)"
        raise ValueError(re.sub(pattern, lambda found: names[found[1]], str(error))) from None


def status_of(report: dict[str, Any]) -> int:
    """The exit status of a benchmark that has a report, with a sentence on standard error for every one but 0."""
    if "partial_done" in report:
        told = f"{report['partial_done']} of {report['partial_of']} were done, and are kept"
        print(f"Interrupted; {told}.", file=sys.stderr)
        return 130
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


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def command_line(arguments: Sequence[str] | None = None) -> str:
    """What was run, to be pasted: without the files it wrote, with paths by their last part and without what is private.

    So where the results go changes none of them.

    Args:
        arguments: Of the command; None: this process's own.
    """
    told, before = ["python", "-m", "cluster"], ""
    for text in sys.argv[1:] if arguments is None else arguments:
        option, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
        if before in PRIVATE:
            told.append(PRIVATE[before])
        elif equals and option in PRIVATE:
            told.append(f"{option}={PRIVATE[option]}")
        elif before not in OUTPUTS and option not in OUTPUTS:
            told.append(f"{option}{equals}{_without_path(value)}")
        before = text
    return shlex.join(told)


def _without_path(text: str) -> str:
    """A value with nothing but the last part of each path in it: `/models/x/` is `x`, `csv:/data/a.csv` is `csv:a.csv`."""
    if "/" not in text or text.startswith(SCHEME):  # streams have slashes of their own
        return text
    if text.startswith(("{", "[")):
        return _PATH_IN_JSON.sub(lambda found: f'"{Path(found[1]).name}"', text)
    source, colon, path = text.rpartition(":")
    return f"{source.rpartition('/')[2]}{colon}{Path(path).name}"


def machine_facts() -> dict[str, Any]:
    """What a reader must know of the machine; neither its name nor a path."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load_average_at_start": os.getloadavg()[0],
    }
