"""Requests that were really made: readers of public traces, named `SOURCE:PATH`.

Sources, each with its columns:
    azure     TIMESTAMP, ContextTokens, GeneratedTokens                              one tenant
    mooncake  JSON lines of timestamp (ms), input_length, output_length, [hash_ids]  one tenant
    servegen  arrival_s, client, input_tokens, output_tokens
    vtc       [req_id], client, prompt_len, output_len, req_time_s
    csv       arrival_s, tenant, prompt_tokens, output_tokens
PATH is the file, or a folder that holds exactly one with these columns. Another column is an error: a file with more of them
is another kind of file (VTC's measurements hold every request 13 times). What is wrong is a ValueError that names file, line
and field.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace."""

    arrival_s: float
    """After the first one."""

    tenant: str
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    """Of the prompt's blocks, each with all before it: two requests share the prefix for which they are equal."""


def load_trace(source: str) -> list[TraceRequest]:
    """Read `SOURCE:PATH`, in the order of arrival.

    Raises:
        ValueError: Unknown source, no such file, a missing or unknown column, or a value that is none.
    """
    name, _, text = source.partition(":")
    if name not in SOURCES or not text:
        raise ValueError(f"The trace {source!r} must be SOURCE:PATH with a source of {', '.join(SOURCES)}.")
    return SOURCES[name](text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where a source keeps what, and how a time is read; `tenant` None: there is one only."""

    arrival: str
    prompt: str
    output: str
    tenant: str | None = None
    hashes: str | None = None
    ignored: tuple[str, ...] = ()
    suffix: str = ".csv"
    seconds: Callable[[Any], float] = float

    @property
    def required(self) -> tuple[str, ...]:
        """Columns that every line must have."""
        return (self.arrival, *([self.tenant] if self.tenant else []), self.prompt, self.output)

    @property
    def known(self) -> tuple[str, ...]:
        """Columns that a line may have."""
        return (*self.required, *([self.hashes] if self.hashes else []), *self.ignored)


def _read(layout: _Layout, path_text: str) -> list[TraceRequest]:
    path = _file(Path(path_text), layout)
    requests = [_request(path, line, record, layout) for line, record in _records(path, layout)]
    if not requests:
        raise ValueError(f"{path} has no request: give another trace.")
    first_s = min(request.arrival_s for request in requests)
    from_first = (replace(request, arrival_s=request.arrival_s - first_s) for request in requests)
    return sorted(from_first, key=lambda request: request.arrival_s)


def _file(path: Path, layout: _Layout) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} is neither file nor folder: give the trace's path.")
    found = [one for one in sorted(path.glob(f"*{layout.suffix}")) if _is_trace(one, layout)]
    if len(found) != 1:
        names = "".join(f", {one.name}" for one in found)
        raise ValueError(f"{path} has {len(found)} traces of that kind{names}: give the file.")
    return found[0]


def _is_trace(path: Path, layout: _Layout) -> bool:
    try:
        _line, record = next(_records(path, layout))
    except (StopIteration, ValueError):
        return False
    return set(layout.required) <= set(record)


def _records(path: Path, layout: _Layout) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield lines with their numbers, their columns checked."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = _json_lines(path, file) if layout.suffix == ".jsonl" else _csv_lines(path, file, layout)
            for line, record in lines:
                _check_columns(path, line, record, layout)
                yield line, record
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no text of lines and columns ({error}): give another file.") from None


def _csv_lines(path: Path, file: Iterator[str], layout: _Layout) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(file)
    _check_columns(path, 1, dict.fromkeys(reader.fieldnames or (), ""), layout)
    for record in reader:
        if None in record:
            raise ValueError(
                f"Line {reader.line_num} of {path} has more values than line 1 has columns: take them out."
            )
        yield reader.line_num, record


def _json_lines(path: Path, file: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(file, start=1):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"Line {line} of {path} must be a JSON object.")
        yield line, record


def _check_columns(path: Path, line: int, record: Mapping[str, Any], layout: _Layout) -> None:
    for field in layout.required:
        if record.get(field) is None:
            raise ValueError(f"Line {line} of {path} has no {field}: it must be there in every line.")
    for field in record:
        if field not in layout.known:
            raise ValueError(f"Line {line} of {path} has an unknown {field!r}: known are {', '.join(layout.known)}.")


def _request(path: Path, line: int, record: Mapping[str, Any], layout: _Layout) -> TraceRequest:
    """One line, its arrival as the file has it."""

    def value(field: str, read: Callable[[Any], float]) -> float:
        try:
            number = math.nan if isinstance(record[field], bool) else read(record[field])
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise ValueError(f"{field} in line {line} of {path} must be a number and not negative.")
        return number

    def tokens(field: str) -> int:
        number = value(field, float)
        if not number.is_integer():
            raise ValueError(f"{field} in line {line} of {path} must be a whole number: it is {number}.")
        return int(number)

    tenant = "" if layout.tenant is None else str(record[layout.tenant])
    if layout.tenant is not None and not tenant:
        raise ValueError(f"{layout.tenant} in line {line} of {path} must not be empty.")
    hashes = record.get(layout.hashes, []) if layout.hashes else []
    if not isinstance(hashes, list) or not all(type(one) is int and one >= 0 for one in hashes):
        raise ValueError(f"{layout.hashes} in line {line} of {path} must be a list of whole numbers, none negative.")
    return TraceRequest(
        arrival_s=value(layout.arrival, layout.seconds),
        tenant=tenant,
        prompt_tokens=tokens(layout.prompt),
        output_tokens=tokens(layout.output),
        prefix_hashes=tuple(hashes),
    )


def _instant_s(text: object) -> float:
    # Without a zone it is UTC: in local time, an hour may come twice.
    instant = datetime.fromisoformat(str(text))
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()


_LAYOUTS = {
    "azure": _Layout(arrival="TIMESTAMP", prompt="ContextTokens", output="GeneratedTokens", seconds=_instant_s),
    "mooncake": _Layout(
        arrival="timestamp", prompt="input_length", output="output_length", hashes="hash_ids", suffix=".jsonl",
        seconds=lambda value: float(value) / 1000.0,
    ),
    "servegen": _Layout(arrival="arrival_s", prompt="input_tokens", output="output_tokens", tenant="client"),
    "vtc": _Layout(
        arrival="req_time_s", prompt="prompt_len", output="output_len", tenant="client", ignored=("req_id",)
    ),
    "csv": _Layout(arrival="arrival_s", prompt="prompt_tokens", output="output_tokens", tenant="tenant"),
}  # fmt: skip

SOURCES: dict[str, Callable[[str], list[TraceRequest]]] = {
    name: partial(_read, layout) for name, layout in _LAYOUTS.items()
}
"""What reads the text after the colon."""
