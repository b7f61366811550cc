"""Requests that were really made: readers of public traces, named `SOURCE:PATH`.

Sources, each with its columns:
    azure     TIMESTAMP, ContextTokens, GeneratedTokens                              no tenant
    mooncake  JSON lines of timestamp (ms), input_length, output_length, [hash_ids]  no tenant
    servegen  arrival_s, client, input_tokens, output_tokens
    vtc       [req_id], client, prompt_len, output_len, req_time_s
    csv       arrival_s, tenant, prompt_tokens, output_tokens
PATH is the file, or a folder that holds exactly one with these columns. Another column is an error: a file with more of them
is another kind of file (VTC's measurements hold every request 13 times). Lines come in the order of arrival, with lengths
above 0. What is wrong is a ValueError that names file, line and field; wrong lines can be left out and counted instead.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HASH_TOKENS = 512
"""Tokens of a block that has a prefix hash, in Mooncake's traces."""

MAX_TOKENS = 1 << 24
"""Longest prompt or output: no model's context is near it, so a greater number is a mistake."""


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

    hash_tokens: int = HASH_TOKENS
    """Tokens of a block; of the last one there may be fewer."""

    prompt_token_ids: tuple[int, ...] = ()
    """Of sources that make prompts up themselves."""

    line: int = field(default=0, compare=False)
    """Of the file; 0 where there is none."""


class BadLineError(ValueError):
    """A line that is no request, and the reason in one word or two."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_trace(source: str, dropped: Counter[str] | None = None) -> Iterator[TraceRequest]:
    """Read `SOURCE:PATH` line by line; with `dropped`, lines that are wrong are left out and counted there by reason.

    Raises:
        ValueError: Unknown source, no such file, a missing or unknown column; without `dropped` also a wrong line.
    """
    name, _, text = source.partition(":")
    if name not in SOURCES or not text:
        raise ValueError(f"The trace {source!r} must be SOURCE:PATH with a source of {', '.join(SOURCES)}.")
    return _read(_LAYOUTS[name], _file(Path(text), _LAYOUTS[name]), dropped)


def load_trace(source: str) -> list[TraceRequest]:
    """Read all of `SOURCE:PATH`; see `read_trace`."""
    return list(read_trace(source))


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


def _read(layout: _Layout, path: Path, dropped: Counter[str] | None) -> Iterator[TraceRequest]:
    first_s: float | None = None
    last_s = 0.0
    for line, record in _records(path, layout):
        try:
            request = _request(path, line, record, layout)
            if request.arrival_s < last_s:
                raise BadLineError(
                    "order", f"{layout.arrival} in line {line} of {path} is earlier than above: sort it."
                )
        except BadLineError as error:
            if dropped is None:
                raise
            dropped[error.reason] += 1
            continue
        last_s = request.arrival_s
        first_s = last_s if first_s is None else first_s
        yield replace(request, arrival_s=last_s - first_s)
    if first_s is None:
        raise ValueError(f"{path} has no request: give another trace.")


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
        line, record = next(_records(path, layout))
        _check_columns(path, line, record, layout)
    except (StopIteration, ValueError):
        return False
    return True


def _records(path: Path, layout: _Layout) -> Iterator[tuple[int, object]]:
    """Yield lines with their numbers; of CSV the head is checked."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if layout.suffix == ".jsonl":
                yield from enumerate(map(_json, file), start=1)
                return
            reader = csv.DictReader(file)
            try:
                _check_columns(path, 1, dict.fromkeys(reader.fieldnames or (), ""), layout)
            except BadLineError as error:  # without a head there are no lines, right or wrong
                raise ValueError(str(error)) from None
            for record in reader:
                yield reader.line_num, record
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no text of lines and columns ({error}): give another file.") from None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _check_columns(path: Path, line: int, record: object, layout: _Layout) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise BadLineError("columns", f"Line {line} of {path} must be a JSON object.")
    if None in record:
        raise BadLineError("columns", f"Line {line} of {path} has more values than line 1 has columns: take them out.")
    for name in layout.required:
        if record.get(name) is None:
            raise BadLineError("columns", f"Line {line} of {path} has no {name}: it must be there in every line.")
    for name in record:
        if name not in layout.known:
            known = ", ".join(layout.known)
            raise BadLineError("columns", f"Line {line} of {path} has an unknown {name!r}: known are {known}.")
    return record


def _request(path: Path, line: int, checked: object, layout: _Layout) -> TraceRequest:
    """One line, its arrival as the file has it."""
    record = _check_columns(path, line, checked, layout)

    def value(name: str, read: Callable[[Any], float]) -> float:
        try:
            number = math.nan if isinstance(record[name], bool) else read(record[name])
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 <= number < math.inf:
            reason = "negative" if number < 0 else "value"
            raise BadLineError(reason, f"{name} in line {line} of {path} must be a number and not negative.")
        return number

    def tokens(name: str) -> int:
        number = value(name, float)
        if not number.is_integer():
            raise BadLineError("value", f"{name} in line {line} of {path} must be a whole number: it is {number}.")
        if number == 0:
            raise BadLineError("zero length", f"{name} in line {line} of {path} must be above 0.")
        if number > MAX_TOKENS:
            raise BadLineError(
                "value", f"{name} in line {line} of {path} must be at most {MAX_TOKENS}: it is {number}."
            )
        return int(number)

    tenant = "" if layout.tenant is None else str(record[layout.tenant])
    if layout.tenant is not None and not tenant:
        raise BadLineError("value", f"{layout.tenant} in line {line} of {path} must not be empty.")
    hashes = record.get(layout.hashes, []) if layout.hashes else []
    if not isinstance(hashes, list) or not all(type(one) is int and one >= 0 for one in hashes):
        message = f"{layout.hashes} in line {line} of {path} must be a list of whole numbers, none negative."
        raise BadLineError("value", message)
    return TraceRequest(
        arrival_s=value(layout.arrival, layout.seconds),
        tenant=tenant,
        prompt_tokens=tokens(layout.prompt),
        output_tokens=tokens(layout.output),
        prefix_hashes=tuple(hashes),
        line=line,
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

SOURCES = tuple(_LAYOUTS)
"""What may stand before the colon."""

WITHOUT_TENANTS = frozenset(name for name, layout in _LAYOUTS.items() if layout.tenant is None)
"""Sources whose requests have an empty tenant."""
