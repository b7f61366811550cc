"""What `status --watch` shows: the last looks at a cluster as curves, above its tables.

Rules:
- Figures in, lines out: no clock, no terminal.
- A column of a curve is a look, the newest at the right; where nothing was known it is empty. Shares are drawn against 1,
  everything else against the most that is seen in the curve.
- What is away is said in the words of whoever noticed, and what is known of the rest is shown all the same.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", ".:-=+*#@"
MAX_LOOKS = 240
SILENT_S = 10.0
"""An engine that has requests running and says nothing for so long is away."""

HOME, TO_LINE_END, TO_SCREEN_END = "\033[H", "\033[K", "\033[J"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Figures of all replicas at one look; None is not known."""

    num_replicas: int = 0
    num_running: int | None = None
    num_waiting: int | None = None
    tokens_per_s: float | None = None
    kv_used_fraction: float | None = None
    """Of the replica whose KV cache is fullest."""

    preemptions: int | None = None
    """Since the look before."""

    gap_of_bound: float | None = None
    """Of the pool where it is largest."""

    away: tuple[str, ...] = ()
    """What does not answer, a sentence each."""

    @property
    def replicas(self) -> str:
        """How many there are, in words."""
        return f"{self.num_replicas} replica{'' if self.num_replicas == 1 else 's'}"

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], fairness: Mapping[str, Any], away: Iterable[str] = ()) -> Self:
        """Sum up what `cluster.status` found.

        Args:
            rows: Of replicas, as `cluster.status.summarise` makes them.
            fairness: As `cluster.status.fetch_fairness` returns it.
            away: What did not answer beyond these.
        """
        told = [row for row in rows if "epoch" in row]
        missing = [*away, *filter(None, (_silence(row) for row in rows))]
        if "away" in fairness:
            missing.append(f"Fairness: {fairness['away']}")
        ratios = [pool["gap_of_bound"] for pool in fairness.get("pools", {}).values()]
        return cls(
            num_replicas=len(rows),
            num_running=sum(row["num_running"] for row in told) if told else None,
            num_waiting=sum(row["num_waiting"] for row in told) if told else None,
            tokens_per_s=sum(row["tokens_per_s"] for row in told) if told else None,
            kv_used_fraction=max((row["kv_used_fraction"] for row in told), default=None),
            preemptions=sum(row["new_preemptions"] for row in told) if told else None,
            gap_of_bound=max((ratio for ratio in ratios if ratio is not None), default=None),
            away=tuple(missing),
        )


def _silence(row: Mapping[str, Any]) -> str | None:
    """A sentence where a replica's engine does not speak."""
    if "epoch" not in row or not row["num_running"] or row["age_s"] <= SILENT_S:
        return None
    what = f"its engine has {row['num_running']} running and is silent for {row['age_s']:.0f} s"
    return f"Replica {row['replica'][-10:]}: {what}."


@dataclass(frozen=True, slots=True)
class _Curve:
    title: str
    value: Callable[[Look], float | None]
    show: Callable[[float], str]
    top: float | None = None
    """What a full block is; None: the most in the curve."""


CURVES = (
    _Curve("tokens/s", lambda look: look.tokens_per_s, lambda value: f"{value:.0f}"),
    _Curve("running", lambda look: look.num_running, lambda value: f"{value:.0f}"),
    _Curve("waiting", lambda look: look.num_waiting, lambda value: f"{value:.0f}"),
    _Curve("KV used", lambda look: look.kv_used_fraction, lambda value: f"{value:.0%}", 1.0),
    _Curve("preemptions", lambda look: look.preemptions, lambda value: f"{value:.0f}"),
    _Curve("gap/bound", lambda look: look.gap_of_bound, lambda value: f"{value:.2f}", 1.0),
)
TITLE_WIDTH, VALUE_WIDTH = 12, 26


class LiveView:
    """The last looks."""

    def __init__(self, *, blocks: str = BLOCKS) -> None:
        """Begin with none.

        Args:
            blocks: What curves are drawn with, from low to high.
        """
        self._looks: deque[Look] = deque(maxlen=MAX_LOOKS)
        self._blocks = blocks

    def add(self, look: Look) -> None:
        """Take another look."""
        self._looks.append(look)

    def frame(self, tables: str, *, time: str, width: int, height: int) -> list[str]:
        """Lines that fit a terminal: curves, what is away, tables; after the first look.

        Args:
            tables: Shown below, as far as there is room.
            time: Of the last look.
            width: Columns; so with `height`.
        """
        now = self._looks[-1]
        lines = [f"{time}   {now.replicas}   Ctrl-C ends"]
        lines += [self._line(curve, width) for curve in CURVES]
        lines += [f"Away: {sentence}" for sentence in now.away]
        lines += ["", *tables.splitlines()]
        room = max(1, height - 1)  # the cursor has a line of its own
        if len(lines) > room:
            lines = [*lines[: room - 1], f"... {len(lines) - room + 1} more lines"]
        return [line[:width] for line in lines]

    def _line(self, curve: _Curve, width: int) -> str:
        room = max(1, width - TITLE_WIDTH - VALUE_WIDTH)
        values = [curve.value(look) for look in self._looks][-room:]
        known = [value for value in values if value is not None]
        now = "-" if values[-1] is None else curve.show(values[-1])
        most = f"most {curve.show(max(known))}" if known else ""
        drawn = draw(values, top=curve.top, blocks=self._blocks).rjust(min(room, MAX_LOOKS))
        return f"{curve.title:<{TITLE_WIDTH}}{drawn}{now:>9}   {most}".rstrip()


def draw(values: Iterable[float | None], *, top: float | None = None, blocks: str = BLOCKS) -> str:
    """A character for each value: the lowest block for 0, the highest for `top` and beyond, none where it is not known."""
    values = list(values)
    full = top if top is not None else max((value for value in values if value is not None), default=0.0)
    steps = len(blocks) - 1

    def block(value: float | None) -> str:
        if value is None:
            return " "
        share = min(max(value / full, 0.0), 1.0) if full > 0.0 else 0.0
        return blocks[-int(-share * steps // 1)]  # whatever is above 0 is seen

    return "".join(block(value) for value in values)


def plain_line(look: Look, *, time: str) -> str:
    """A look as one line, for files and pipes."""
    values = (f"{curve.title} {'-' if (value := curve.value(look)) is None else curve.show(value)}" for curve in CURVES)
    line = f"{time}  {look.replicas}, {', '.join(values)}"
    return f"{line}. Away: {' '.join(look.away)}" if look.away else line


def redrawn(lines: Iterable[str]) -> str:
    """What puts lines where those before were on a terminal."""
    return HOME + "".join(f"{line}{TO_LINE_END}\n" for line in lines) + TO_SCREEN_END


def blocks_for(encoding: str | None) -> str:
    """What curves can be drawn with in an encoding."""
    try:
        BLOCKS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_BLOCKS
    return BLOCKS
