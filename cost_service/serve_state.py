"""Runs the keepers of an actor's services beside its calls, and says when the store is away (shell).

Rules:
- An actor begins with what the store has; one that starts while the store is away waits `START_WAIT_S` for it, and goes on.
- While something is not stored, `adaptivellm_degraded{part="state"}` is 1; an outage is logged when it begins
  and when it ends.
- Keeping takes a tenth of the processor's time at most; a store that does not answer is asked again every second.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from cost_service.keeper import Keeper
from cost_service.serve_metrics import degraded_gauge

logger = logging.getLogger("ray.serve")

INTERVAL_S = 1.0
BUSY_SHARE = 0.1
START_WAIT_S = 5.0


class StateLoop:
    """Keeps several services' state for ever."""

    def __init__(self, name: str, keepers: Sequence[Keeper], *, each_round: Callable[[], None] = lambda: None) -> None:
        """Read what is stored, then go on in a thread of its own.

        Args:
            name: Of the actor, for people.
            each_round: Called before every round in that thread.
        """
        self._name, self._keepers, self._each_round = name, keepers, each_round
        self._degraded = degraded_gauge()
        self._degraded.set(0.0, tags={"part": "state"})
        self._end = threading.Event()
        self._is_away = False
        deadline_s = time.monotonic() + START_WAIT_S
        while not self._keep() and time.monotonic() < deadline_s:
            time.sleep(INTERVAL_S / 2)
        threading.Thread(target=self._run, daemon=True, name="state").start()

    def close(self) -> None:
        """End the thread, after the round that it is in."""
        self._end.set()

    def _run(self) -> None:
        wait_s = INTERVAL_S
        while not self._end.wait(wait_s):
            began_s = time.thread_time()
            try:
                self._each_round()
            except Exception:
                logger.exception("%s: a round beside its calls failed; it goes on.", self._name)
            self._keep()
            wait_s = max(INTERVAL_S, (time.thread_time() - began_s) / BUSY_SHARE)

    def _keep(self) -> bool:
        """One round of every keeper; returns whether the store took it."""
        problem: Exception | None = None
        for keeper in self._keepers:
            try:
                keeper.keep(time.monotonic())
            except ConnectionError as error:  # the others would wait for it, too
                problem = error
                break
            except Exception as error:  # none may end this
                problem = error
        is_away = problem is not None
        if is_away and not self._is_away:
            logger.warning(
                "%s: its state is not stored (%s: %s). It goes on, and stores it as soon as that works.",
                self._name, type(problem).__name__, problem,
                exc_info=None if isinstance(problem, OSError) else problem,
            )  # fmt: skip
        elif self._is_away and not is_away:
            logger.warning("%s: its state is stored again.", self._name)
        if is_away != self._is_away:
            self._is_away = is_away
            self._degraded.set(float(is_away), tags={"part": "state"})
        return not is_away
