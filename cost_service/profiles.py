"""Measured operator times: readers of the layouts that profilers of vLLM write, from any folder.

Layouts, told by their file names (one rank's times; FILE in brackets may be absent):
    vLLM profiles      dense.csv (layer, tokens, time_us), attention.csv (prefill_chunk, kv_prefill, n_decode, kv_decode,
                       time_us), [per_sequence.csv (layer, sequences, time_us)], [skew.csv] in a folder tpN
    older profiles     layers.csv (layer_name, input, kv_cache, tp_size, latency(ns)) and/or attention.csv with time_stats.*
                       columns in ms, whose kv_cache_size counts the tokens of the whole batch
    Vidur              mlp.csv (time_stats.*.median in ms, num_tokens, num_tensor_parallel_workers)
The model's `config.json` lies in the folder or above it; the GPU's name comes from meta.yaml or the folders' names.

Rules: a table that lacks a column, or holds what is not a number, is a ValueError that names file, line and column; columns
that nobody needs are ignored; operators that no model has are named in a warning and left out.
"""

import csv
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cost_service.model_shape import read_config

Array = NDArray[np.float64]

logger = logging.getLogger(__name__)

PARTS = {
    "embedding": ("embedding", "emb"),
    "layernorm": ("layernorm", "input_layernorm", "post_layernorm", "post_attention_layernorm"),
    "qkv_proj": ("qkv_proj", "attn_pre_proj", "q_proj", "k_proj", "v_proj"),
    "qk_norm": ("qk_norm",),
    "rotary_emb": ("rotary_emb", "rope", "attn_rope"),
    "o_proj": ("o_proj", "attn_post_proj"),
    "gate_up_proj": ("gate_up_proj", "mlp_up_proj", "gate_proj", "up_proj"),
    "act_fn": ("act_fn", "mlp_act"),
    "down_proj": ("down_proj", "mlp_down_proj"),
    "final_layernorm": ("final_layernorm",),
    "lm_head": ("lm_head",),
}
"""Our name of each operator, and the profilers' names of it or of its parts, which run one after another."""

ALTERNATIVES = ("layernorm",)
"""Operators whose parts are the same kernel at two places: their times are averaged, not added."""

IGNORED = ("add", "attn", "sampler")
"""Fused into a norm, an attention without cache, and not the model's: no operators of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRows:
    """Measured attention of one layer: at most one prefill and decodes of one context per row."""

    prefill_tokens: Array
    cached_tokens: Array
    num_decodes: Array
    decode_tokens: Array
    """Mean KV tokens of a decoding request."""

    longest_decode: Array
    seconds: Array

    @property
    def context(self) -> Array:
        """Longest cached context of each row."""
        return np.maximum(self.cached_tokens, self.longest_decode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Operator times of one model on one kind of GPU at one tensor-parallel width."""

    folder: Path
    hardware: str
    model: str
    """Name of the folder that holds the model's config.json."""

    parallelism: int
    config: Mapping[str, Any]
    operators: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    """By operator: rows that it computes, rising, and the median seconds at each."""

    attention: AttentionRows | None = None
    uneven: AttentionRows | None = None
    """Attention over decodes of different contexts, some long and the others short."""


def load_profiles(folder: Path, *, model_config: Path | None = None) -> list[Profile]:
    """Read every profile in a folder and below it.

    Args:
        model_config: The model's `config.json`, where the folder has none or another one is meant.

    Raises:
        ValueError: No such folder, no profile in it, a damaged table, or no `config.json`.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the folder of a profile.")
    profiles = [
        profile
        for found in sorted({path.parent for path in folder.rglob("*.csv")})
        for profile in _profiles_of(found, folder, model_config)
    ]
    if not profiles:
        raise ValueError(f"{folder} has no profile: it needs a dense.csv, layers.csv, mlp.csv or attention.csv.")
    return profiles


def _profiles_of(folder: Path, root: Path, model_config: Path | None) -> Iterator[Profile]:
    tables: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, read in (("dense.csv", _dense), ("layers.csv", _layers), ("mlp.csv", _vidur)):
        if (folder / name).is_file():
            for parallelism, operators in read(folder / name).items():
                tables[parallelism]["operators"] = operators
    if (folder / "attention.csv").is_file():
        parallelism, rows = _attention(folder / "attention.csv")
        tables[parallelism]["attention"] = rows
        if (skew := folder / "skew.csv").is_file():
            tables[parallelism]["uneven"] = _uneven(skew, _meta(folder, root).get("measurement_iterations", 1))
    if tables:
        path, config = _config(folder, root, model_config)
        for parallelism, table in sorted(tables.items()):
            yield Profile(
                folder=folder, hardware=_hardware(folder, root), model=path.parent.name, parallelism=parallelism,
                config=config, **table,
            )  # fmt: skip


def _dense(path: Path) -> dict[int, dict[str, tuple[Array, Array]]]:
    times = _times(path, ("layer", "tokens", "time_us"), 1e-6)
    if (sequences := path.with_name("per_sequence.csv")).is_file():
        times |= _times(sequences, ("layer", "sequences", "time_us"), 1e-6)
    return {_parallelism(path.parent): _operators(times, path)}


def _layers(path: Path) -> dict[int, dict[str, tuple[Array, Array]]]:
    columns = ("layer_name", "input", "latency(ns)")
    widths = {int(value) for (value,) in _numbers(path, ("tp_size",))}
    if len(widths) != 1:
        raise ValueError(f"{path} must hold one tp_size, not {sorted(widths)}: split it.")
    return {widths.pop(): _operators(_times(path, columns, 1e-9), path)}


def _vidur(path: Path) -> dict[int, dict[str, tuple[Array, Array]]]:
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    names = [match[1] for name in header if (match := re.fullmatch(r"time_stats\.(.+)\.median", name))]
    columns = ["num_tensor_parallel_workers", "num_tokens", *(f"time_stats.{name}.median" for name in names)]
    times: dict[int, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for width, tokens, *milliseconds in _numbers(path, columns):
        for name, value in zip(names, milliseconds, strict=True):
            times[int(width)][name].append((tokens, 1e-3 * value))
    return {width: _operators(of, path) for width, of in times.items()}


def _attention(path: Path) -> tuple[int, AttentionRows]:
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if "is_prefill" in header:
        return _older_attention(path)
    columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    chunk, cached, decodes, context, time_us = _table(path, columns)
    return _parallelism(path.parent), _attention_rows(path, chunk, cached, decodes, context, context, 1e-6 * time_us)


def _uneven(path: Path, iterations: object) -> AttentionRows:
    """Read skew.csv, whose times are sums over the iterations: its even batches take that many times the grid's."""
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"measurement_iterations in the meta.yaml of {path.parent} must be a whole number above 0.")
    columns = ("pc", "kp", "n", "kv_mean", "kv_big", "t_skew_us")
    *parts, time_us = _table(path, columns)
    return _attention_rows(path, *parts, 1e-6 / iterations * time_us)


def _older_attention(path: Path) -> tuple[int, AttentionRows]:
    rows, widths = [], set()
    for record in _records(path):
        prefill = record.get("is_prefill") == "True"
        median = f"time_stats.attn_{'prefill' if prefill else 'decode'}.median"
        names = ("num_tensor_parallel_workers", "batch_size", "prefill_chunk_size", "kv_cache_size", median)
        width, batch, chunk, cached, time_ms = (_number(path, record, name) for name in names)
        widths.add(int(width))
        if prefill:
            rows.append((chunk, cached, 0.0, 0.0, 0.0, 1e-3 * time_ms))
        elif cached >= batch:  # below that some requests have no token at all, and the kernel does nothing
            each = cached // batch
            rows.append((0.0, 0.0, batch, each, each, 1e-3 * time_ms))
    if len(widths) != 1:
        raise ValueError(f"{path} must hold one num_tensor_parallel_workers, not {sorted(widths)}: split it.")
    return widths.pop(), _attention_rows(path, *np.array(rows, dtype=np.float64).reshape(-1, 6).T)


def _attention_rows(path: Path, *columns: Array) -> AttentionRows:
    chunk, cached, decodes, context, longest, seconds = columns
    if len(seconds) == 0 or not (seconds > 0.0).all():
        raise ValueError(f"The times in {path} must be above 0: profile again.")
    return AttentionRows(
        prefill_tokens=chunk,
        cached_tokens=np.where(chunk > 0, cached, 0.0),
        num_decodes=decodes,
        decode_tokens=np.where(decodes > 0, context, 0.0),
        longest_decode=np.where(decodes > 0, longest, 0.0),
        seconds=seconds,
    )


def _times(path: Path, columns: Sequence[str], unit_s: float) -> dict[str, list[tuple[float, float]]]:
    """Read (tokens, seconds) by a profiler's operator."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    name, tokens, time = columns
    for record in _records(path):
        if name not in record:
            raise ValueError(f"{path} has no column {name!r}: profile again, or name the column so.")
        times[str(record[name])].append((_number(path, record, tokens), unit_s * _number(path, record, time)))
    return times


def _operators(times: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> dict[str, tuple[Array, Array]]:
    """Our operators from a profiler's: parts added, repetitions at one batch size as their median."""
    known = {part for parts in PARTS.values() for part in parts}
    if unknown := sorted(set(times) - known - set(IGNORED)):
        logger.warning("%s has operators that no model here has, they are left out: %s.", path, ", ".join(unknown))
    operators = {}
    for operator, parts in PARTS.items():
        curves = [_medians(times[part]) for part in parts if part in times]
        if curves:
            tokens = sorted(set.intersection(*(set(curve) for curve in curves)))
            seconds = [sum(curve[n] for curve in curves) for n in tokens]
            share = len(curves) if operator in ALTERNATIVES else 1
            operators[operator] = (np.array(tokens), np.array(seconds) / share)
            if not (operators[operator][1] > 0.0).all():
                raise ValueError(f"The times of {operator} in {path} must be above 0: profile again.")
    return operators


def _medians(points: Sequence[tuple[float, float]]) -> dict[float, float]:
    at: dict[float, list[float]] = defaultdict(list)
    for tokens, seconds in points:
        at[tokens].append(seconds)
    return {tokens: float(np.median(seconds)) for tokens, seconds in at.items()}


class _Record(dict[str, Any]):
    """A row of a table, and the line that it stands in."""

    line: int = 0


def _records(path: Path) -> Iterator[_Record]:
    with path.open(newline="") as file:
        for line, columns in enumerate(csv.DictReader(file), start=2):
            record = _Record(columns)
            record.line = line
            yield record


def _numbers(path: Path, columns: Sequence[str]) -> Iterator[tuple[float, ...]]:
    for record in _records(path):
        yield tuple(_number(path, record, column) for column in columns)


def _table(path: Path, columns: Sequence[str]) -> Array:
    """Columns as rows of an array."""
    return np.array(list(_numbers(path, columns)), dtype=np.float64).reshape(-1, len(columns)).T


def _number(path: Path, record: _Record, column: str) -> float:
    if column not in record:
        raise ValueError(f"{path} has no column {column!r}: profile again, or name the column so.")
    try:
        value = float(record[column])
    except (TypeError, ValueError):
        value = float("nan")
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{column} in line {record.line} of {path} must be a number and not negative.")
    return value


def _parallelism(folder: Path) -> int:
    match = re.fullmatch(r"tp(\d+)", folder.name)
    return int(match[1]) if match else 1


def _hardware(folder: Path, root: Path) -> str:
    if hardware := _meta(folder, root).get("hardware"):
        return str(hardware)
    for parent in _upwards(folder, root):
        if match := re.match(r"(?:[A-Z]+\d+\w*?)(?=_|$)", parent.name):
            return match[0]
    return root.name


def _meta(folder: Path, root: Path) -> Mapping[str, Any]:
    """The nearest meta.yaml; empty without any."""
    path = next((path for parent in _upwards(folder, root) if (path := parent / "meta.yaml").is_file()), None)
    if path is None:
        return {}
    try:
        meta = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML: {error}") from None
    if not isinstance(meta, dict):
        raise ValueError(f"{path} must hold keys and values, as profilers of vLLM write it.")
    return meta


def _config(folder: Path, root: Path, model_config: Path | None) -> tuple[Path, Mapping[str, Any]]:
    paths = [model_config] if model_config else [parent / "config.json" for parent in _upwards(folder, root)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no config.json of its model, nor a folder above it: give --model-config.")
    return path, read_config(path)


def _upwards(folder: Path, root: Path) -> Iterator[Path]:
    """Return the folder and those above it, three beyond the root: a profile may be given by its innermost folder."""
    parents = [folder, *folder.parents]
    inside = len(folder.resolve().relative_to(root.resolve()).parts) if folder != root else 0
    yield from parents[: inside + 4]
