"""Requests that were really made: readers of public traces, named `SOURCE:PATH`.

Sources, each with the columns that it needs (others are ignored):
    azure     TIMESTAMP, ContextTokens, GeneratedTokens                  one tenant
    mooncake  JSON lines of timestamp (ms), input_length, output_length  one tenant
    servegen  arrival_s, client, input_tokens, output_tokens
    vtc       req_time_s, client, prompt_len, output_len
    csv       arrival_s, tenant, prompt_tokens, output_tokens
PATH is the file, or a folder that holds exactly one of its kind. What is wrong is a ValueError that names file, line and
field.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where a source keeps what, and how a time is read; `tenant` None: there is one only."""

    arrival: str
    prompt: str
    output: str
    tenant: str | None = None
    suffix: str = ".csv"
    seconds: Callable[[Any], float] = float


SOURCES = {
    "azure": _Layout(
        arrival="TIMESTAMP", prompt="ContextTokens", output="GeneratedTokens",
        seconds=lambda text: datetime.fromisoformat(str(text)[:26]).timestamp(),
    ),
    "mooncake": _Layout(
        arrival="timestamp", prompt="input_length", output="output_length", suffix=".jsonl",
        seconds=lambda value: float(value) / 1000.0,
    ),
    "servegen": _Layout(arrival="arrival_s", prompt="input_tokens", output="output_tokens", tenant="client"),
    "vtc": _Layout(arrival="req_time_s", prompt="prompt_len", output="output_len", tenant="client"),
    "csv": _Layout(arrival="arrival_s", prompt="prompt_tokens", output="output_tokens", tenant="tenant"),
}  # fmt: skip


def load_trace(source: str) -> list[TraceRequest]:
    """Read `SOURCE:PATH`, in the order of arrival.

    Raises:
        ValueError: Unknown source, no such file, a missing column, or a value that is none.
    """
    name, _, path_text = source.partition(":")
    layout = SOURCES.get(name)
    if layout is None or not path_text:
        raise ValueError(f"The trace {source!r} must be SOURCE:PATH with a source of {', '.join(SOURCES)}.")
    path = _file(Path(path_text), layout)
    rows = [_request(path, line, record, layout) for line, record in _records(path)]
    if not rows:
        raise ValueError(f"{path} has no request: give another trace.")
    first_s = min(arrival_s for arrival_s, *_ in rows)
    requests = [
        TraceRequest(arrival_s=arrival_s - first_s, tenant=tenant, prompt_tokens=prompt, output_tokens=output)
        for arrival_s, tenant, prompt, output in rows
    ]
    return sorted(requests, key=lambda request: request.arrival_s)


def _file(path: Path, layout: _Layout) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} is neither file nor folder: give the trace's path.")
    needed = [layout.arrival, layout.prompt, layout.output]
    found = [
        one for one in sorted(path.glob(f"*{layout.suffix}")) if all(name in one.open().readline() for name in needed)
    ]
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} traces of that kind: give the file.")
    return found[0]


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(newline="") as file:
        if path.suffix != ".jsonl":
            yield from enumerate(csv.DictReader(file), start=2)
            return
        for line, text in enumerate(file, start=1):
            try:
                record = json.loads(text)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"Line {line} of {path} must be a JSON object.")
            yield line, record


def _request(path: Path, line: int, record: Mapping[str, Any], layout: _Layout) -> tuple[float, str, int, int]:
    def value(field: str, read: Callable[[Any], float]) -> float:
        if record.get(field) is None:
            raise ValueError(f"Line {line} of {path} has no {field}: it must be there in every line.")
        try:
            number = read(record[field])
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise ValueError(f"{field} in line {line} of {path} must be a number and not negative.")
        return number

    tenant = "" if layout.tenant is None else record.get(layout.tenant)
    if tenant is None:
        raise ValueError(f"Line {line} of {path} has no {layout.tenant}: it must be there in every line.")
    prompt, output = value(layout.prompt, float), value(layout.output, float)
    return value(layout.arrival, layout.seconds), str(tenant), int(prompt), int(output)
