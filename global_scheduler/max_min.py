"""Weighted max-min shares of tenants that can use only some of the replicas (water-filling).

Source: Megiddo 1974 (lexicographically optimal flows); CM4FQ (arXiv:1601.04749) for its use in fair queueing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

Reach = frozenset[str]
"""Replicas that may serve a tenant."""


@dataclass(frozen=True, slots=True)
class Level:
    """Tenants whom the same replicas hold back, and their share."""

    rate: float
    """Service per second and unit of weight."""

    tenants: frozenset[str]
    replicas: frozenset[str]
    """Those that serve these tenants alone."""


def max_min_levels(weights: Mapping[str, float], reach: Mapping[str, Reach], rates: Mapping[str, float]) -> list[Level]:
    """Weighted max-min shares of tenants that always wait, each of which only some replicas may serve; lowest rate first.

    Water-filling: raise all tenants' rate per weight alike until a set of tenants takes all that the replicas it can reach
    can give. Those are a level; the others share the other replicas. Within a level the bound holds for every pair; one of a
    higher level never takes from a lower one.

    Args:
        weights: By tenant.
        reach: Replicas that may serve a tenant, by tenant.
        rates: Service per second, by replica.

    Raises:
        ValueError: A tenant reaches no replica.
    """
    if (lost := next((name for name in weights if not reach[name] & rates.keys()), None)) is not None:
        raise ValueError(f"Tenant {lost!r} reaches none of the replicas.")
    tenants, left = dict(weights), dict(rates)
    levels: list[Level] = []
    while tenants:
        groups = _groups(tenants, reach, frozenset(left))
        held = _bottleneck(groups, left)
        replicas = frozenset[str]().union(*held)
        level = sum(left[each] for each in replicas) / sum(groups[each] for each in held)
        names = frozenset(name for name in tenants if reach[name] & frozenset(left) <= replicas)
        levels.append(Level(level, names, replicas))
        tenants = {name: weight for name, weight in tenants.items() if name not in names}
        left = {name: rate for name, rate in left.items() if name not in replicas}
    return levels


def _groups(tenants: Mapping[str, float], reach: Mapping[str, Reach], left: Reach) -> dict[Reach, float]:
    """Weights of tenants that reach the same replicas."""
    groups: dict[Reach, float] = {}
    for name, weight in tenants.items():
        where = reach[name] & left
        groups[where] = groups.get(where, 0.0) + weight
    return groups


def _bottleneck(groups: Mapping[Reach, float], rates: Mapping[str, float]) -> list[Reach]:
    """Groups whose replicas give the least per weight.

    Begins with all groups. While their common rate asks too much of some replicas, goes on with the groups that ask it
    (Dinkelbach's iteration on minimum cuts): the rate falls every time, so it ends.
    """
    held = list(groups)
    while True:
        replicas = frozenset[str]().union(*held)
        rate = sum(rates[each] for each in replicas) / sum(groups[each] for each in held)
        starved = _starved({each: rate * groups[each] for each in held}, rates)
        if not starved or len(starved) == len(held):
            return held
        held = starved


def _starved(demands: Mapping[Reach, float], rates: Mapping[str, float]) -> list[Reach]:
    """Groups that cannot all get what they demand, together with those whom they displace; none if everybody can.

    Augmenting paths between groups and replicas; what a group that lacks something can reach in the residual is the cut.
    """
    flow: dict[tuple[Reach, str], float] = {(group, each): 0.0 for group in demands for each in group}
    lacks, free = dict(demands), dict(rates)
    least = 1e-9 * max(demands.values(), default=0.0)
    while True:
        came: dict[Reach | str, Reach | str | None] = {group: None for group in demands if lacks[group] > least}
        frontier: list[Reach | str] = list(came)
        end: str | None = None
        for node in frontier:
            if isinstance(node, str):
                if free[node] > least:
                    end = node
                    break
                reached: list[Reach | str] = [group for group in demands if flow.get((group, node), 0.0) > least]
            else:
                reached = sorted(node)
            new = [each for each in reached if each not in came]
            came.update(dict.fromkeys(new, node))
            frontier.extend(new)
        if end is None:
            return [group for group in demands if group in came]
        path: list[Reach | str] = [end]
        while (before := came[path[-1]]) is not None:
            path.append(before)
        path.reverse()
        steps = list(pairwise(path))
        forth = [(a, b) for a, b in steps if isinstance(a, frozenset) and isinstance(b, str)]
        back = [(b, a) for a, b in steps if isinstance(a, str) and isinstance(b, frozenset)]
        start = path[0]
        assert isinstance(start, frozenset)
        amount = min(lacks[start], free[end], *(flow[edge] for edge in back))
        for edge in forth:
            flow[edge] += amount
        for edge in back:
            flow[edge] -= amount
        lacks[start] -= amount
        free[end] -= amount
