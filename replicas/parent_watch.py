"""Ends an engine or worker process soon after its parent is gone, however the parent ended.

Why a thread: `PR_SET_PDEATHSIG` fires when the *thread* that forked ends, and a server starts its engine from threads that
come and go. A process handle (`pidfd`) becomes readable exactly when the parent is dead, and costs nothing until then.
"""

import multiprocessing
import os
import select
import threading
from collections.abc import Callable

PARENT_VARIABLE = "ADAPTIVELLM_ENGINE_PARENT"
"""Environment variable with the process id of the replica's server; unset outside a replica (tests, plain vLLM)."""

_watched: set[int] = set()


def watch_parent(on_loss: Callable[[], None] | None = None) -> bool:
    """Start the watch once per process; False where no replica's server asked for it.

    The engine's parent is the server itself, a worker's parent is the engine: each watches the process that started it.

    Args:
        on_loss: Called when the parent is gone; by default the process ends at once, without clean-up that could hang.
    """
    server_pid = os.environ.get(PARENT_VARIABLE)
    parent = multiprocessing.parent_process()
    if not server_pid or parent is None or os.getpid() in _watched:
        return False  # the server itself comes by here too: vLLM loads its plugins there as well
    _watched.add(os.getpid())
    threading.Thread(
        target=_wait_for_end,
        args=(parent.pid, on_loss or _exit_now),
        name="adaptivellm-parent-watch",
        daemon=True,
    ).start()
    return True


def _exit_now() -> None:
    os._exit(1)


def _wait_for_end(parent_pid: int, on_loss: Callable[[], None]) -> None:
    try:
        handle = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        on_loss()
        return
    try:
        # A parent that died while this process was still importing has left it to another one.
        if os.getppid() == parent_pid:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll()
    finally:
        os.close(handle)
    on_loss()
