"""What `python -m cluster bench --serve` measures: the running clusters, what they are to follow, and the requests.

Rules:
- A cluster is a URL of HTTP. Only where there is one is it told to follow policies in turns; several are taken as they are.
- Settings of a plan name neither key nor host.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster import policy
from cluster.bench_arm import ADMISSIONS, STOCK, arm_names
from cluster.bench_keys import is_key
from cluster.prompts import RequestSpec
from cluster.serve import DEFAULT_CONFIG
from cluster.served_client import Endpoint
from cluster.workload import Workload

TRACE = "synthetic:requests=60,rate=3,tenants=2,output_mean=32"
LEAST_VOCAB = 512
"""Token ids of prompts are below it where the workload says nothing else; every model has as many."""

RUNNING = "running"
"""The arm that is a cluster as it runs."""


def add_served_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running clusters", "instead of engines that the benchmark starts")
    group.add_argument("--serve", metavar="URL", help="drive what runs there over HTTP; or NAME=URL,NAME=URL in turns")
    group.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys by tenant: JSON, or lines of NAME KEY; mode 0600"
    )
    group.add_argument("--key", help="one API key for all tenants; whoever lists processes sees it")
    group.add_argument(
        "--make-tenants", action="store_true", help="make tenants for the run, with keys in memory alone"
    )
    group.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="Serve config file that says where their store is"
    )
    group.add_argument(
        "--address", help="the URL's Ray cluster, to ask for preemptions (default: only to switch policies)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedArm:
    """A running cluster, and what it is to follow; None: what it follows already."""

    url: str
    preemption: str | None = None
    admission: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPlan:
    """What is measured."""

    arms: dict[str, ServedArm]
    workload: Workload
    workloads: tuple[tuple[RequestSpec, ...], ...]
    """Its requests, for every repeat."""

    dropped: dict[str, int]
    vocab: int
    models: list[str]
    """That the clusters serve, in the order of the arms."""

    limit_s: float

    @property
    def stock_arm(self) -> str | None:
        """The arm that the others are compared with."""
        return STOCK if STOCK in self.arms else None

    def identity(self) -> list[Any]:
        """What makes two plans the same: what is measured, request by request, and where."""
        requests = [[asdict(request) for request in workload] for workload in self.workloads]
        return [self.as_report(), [arm.url for arm in self.arms.values()], requests]

    def as_report(self) -> dict[str, Any]:
        """Settings as they stand in the result file; of clusters only their names."""
        followed = {name: {"preemption": arm.preemption, "admission": arm.admission} for name, arm in self.arms.items()}
        return self.workload.as_report() | {
            "arms": followed, "models": self.models, "weights": dict(self.workload.weights()),
            "known_lengths": True,  # `ignore_eos` and `max_tokens` say them
            "dropped_requests": self.dropped, "different_workloads": len(set(self.workloads)),
            "repeats": len(self.workloads), "limit_s": self.limit_s,
        }  # fmt: skip


def arms_of(options: argparse.Namespace) -> dict[str, ServedArm]:
    """The arms that `--serve`, `--policy` and `--admission` name.

    Raises:
        ValueError: One of them is wrong, or they do not go together.
    """
    if "=" not in options.serve.partition("://")[0]:
        return _switched(base_url(options.serve), options.policy, options.admission)
    if options.policy is not None or options.admission is not None:
        raise ValueError("--policy and --admission switch one cluster: leave them out where --serve names several.")
    pairs = [part.partition("=") for part in options.serve.split(",")]
    if bad := [name for name, _, _ in pairs if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,31}", name)]:
        raise ValueError(f"--serve has a cluster named {bad[0]!r}: use NAME=URL,NAME=URL with letters and digits.")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError("--serve names a cluster twice: name each once.")
    return {name: ServedArm(url=base_url(url)) for name, _, url in pairs}


def _switched(url: str, policies: str | None, admissions: str | None) -> dict[str, ServedArm]:
    """The arms of one cluster: all pairs of what is named, or as it runs."""
    own = ServedArm(url=url)
    preemptions = _names("policy", policies, (STOCK, *policy.CHOICES))
    if STOCK in preemptions:
        raise ValueError(
            f"The arm {STOCK} needs engines of its own: serve it beside, and use --serve {STOCK}=URL,NAME=URL."
        )
    orders = _names("admission", admissions, ADMISSIONS)
    if not preemptions:
        return {order: replace(own, admission=order) for order in orders} or {RUNNING: own}
    both = [(order, preemption) for order in orders or (None,) for preemption in preemptions]
    names = arm_names(preemptions, orders or [""])
    return {
        name: replace(own, preemption=preemption, admission=order)
        for name, (order, preemption) in zip(names, both, strict=True)
    }


def base_url(text: str) -> str:
    """A server's address without `/v1`.

    Raises:
        ValueError: It is none of HTTP, or names more than a server.
    """
    with suppress(ValueError):  # of a port that is no number
        url = urlsplit(text)
        plain = not (url.query or url.fragment or url.username or url.password)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0 and plain:
            return text.rstrip("/").removesuffix("/v1")
    raise ValueError("--serve must be the URL of a server, such as http://127.0.0.1:8000, or NAME=URL,NAME=URL.")


def check_options(options: argparse.Namespace, engine_defaults: Mapping[str, Any]) -> None:
    """Check what stands alone.

    Args:
        engine_defaults: Options of engines that the benchmark would start itself, with their defaults.

    Raises:
        ValueError: An option is wrong.
    """
    for name, default in engine_defaults.items():
        if getattr(options, name) != default:
            raise ValueError(
                f"--{name.replace('_', '-')} is for engines that the benchmark starts: leave it out with --serve."
            )
    for name in ("repeats", "limit_s"):
        if not getattr(options, name) > 0 or math.isinf(getattr(options, name)):
            raise ValueError(f"--{name.replace('_', '-')} must be above 0 and finite.")
    ways = [options.make_tenants, options.keys is not None, options.key is not None]
    if sum(ways) != 1:
        raise ValueError("--serve needs one of --make-tenants, --keys FILE and --key KEY: say whose requests they are.")
    if options.key is not None and not is_key(options.key):
        raise ValueError("--key must be an API key, without blanks.")


def check_unused(options: argparse.Namespace) -> None:
    """Refuse what says something of running clusters where none is driven.

    Raises:
        ValueError: There is such an option.
    """
    for name in ("keys", "key", "make_tenants", "address"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} goes with --serve: add that, or leave it out.")


def plan_of(
    options: argparse.Namespace,
    arms: dict[str, ServedArm],
    workload: Workload,
    seeds: Sequence[int],
    endpoints: Mapping[str, Endpoint],
) -> ServedPlan:
    """Read the requests, as long as every model's context allows.

    Raises:
        ValueError: The workload is wrong or does not fit.
    """
    vocab, dropped = max(workload.source_vocab, LEAST_VOCAB), Counter[str]()
    context = min((one.context_tokens for one in endpoints.values() if one.context_tokens), default=None)
    read = {
        seed: replace(workload, seed=seed).prompted(vocab, dropped, context_tokens=context)
        for seed in dict.fromkeys(seeds)
    }
    return ServedPlan(
        arms=arms, workload=workload, workloads=tuple(read[seed] for seed in seeds), dropped=dict(dropped), vocab=vocab,
        models=[endpoints[arm.url].model for arm in arms.values()], limit_s=options.limit_s,
    )  # fmt: skip


def _names(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    names = [] if text is None else text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--{option} has no {unknown[0]!r} for --serve: use some of {', '.join(known)}.")
    if len(set(names)) != len(names):
        raise ValueError(f"--{option} names an arm twice: name each once.")
    return names
