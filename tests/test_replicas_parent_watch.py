"""Goal: no engine and no worker outlives its replica's server by more than seconds, and nobody else is ever ended.

Method: real processes in the shape of a replica: a server that starts an engine, which starts a worker. The server is
killed, and the others are watched from outside. They import the watch alone, so they are there at once.
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from replicas.parent_watch import PARENT_VARIABLE, watch_parent

ROOT = Path(__file__).parents[1]
GONE_S = 5.0
ALIVE_S = 1.5

REPLICA = """
import multiprocessing, os, sys, threading, time
from replicas.parent_watch import PARENT_VARIABLE, watch_parent

def say(role, *values):
    os.write(1, (" ".join(map(str, [role, *values])) + "\\n").encode())

def worker():
    say("worker", os.getpid(), watch_parent(), watch_parent())
    time.sleep(600)

def engine(context_name):
    watched = watch_parent()
    multiprocessing.get_context(context_name).Process(target=worker).start()
    say("engine", os.getpid(), watched, watch_parent())
    time.sleep(600)

if __name__ == "__main__":
    context_name, as_replica = sys.argv[1:]
    if as_replica == "replica":
        os.environ[PARENT_VARIABLE] = str(os.getpid())
    process = multiprocessing.get_context(context_name).Process(target=engine, args=(context_name,))
    starter = threading.Thread(target=process.start)
    starter.start()
    starter.join()  # a thread that has ended is no parent that has ended
    say("server", os.getpid(), watch_parent(), watch_parent())
    time.sleep(600)
"""


class Replica:
    """A server, its engine and its worker: process handles, and what `watch_parent` answered in each of them."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self.server = process
        self.handles: dict[str, int] = {}
        self.pids: dict[str, int] = {}
        self.answers: dict[str, tuple[bool, bool]] = {}
        while len(self.pids) < 3:
            role, pid, first, second = process.stdout.readline().split()
            self.pids[role] = int(pid)
            self.handles[role] = os.pidfd_open(int(pid))
            self.answers[role] = (first == "True", second == "True")

    def is_gone(self, role: str, within_s: float) -> bool:
        """Whether a process has ended, waiting for it for some seconds at most."""
        poll = select.poll()
        poll.register(self.handles[role], select.POLLIN)
        return bool(poll.poll(within_s * 1000))

    def kill(self, role: str) -> None:
        signal.pidfd_send_signal(self.handles[role], signal.SIGKILL)

    def close(self) -> None:
        for role, handle in self.handles.items():
            with suppress(ProcessLookupError):
                self.kill(role)
            os.close(handle)
        self.server.communicate()


@contextmanager
def replica(tmp_path: Path, start_method: str, shape: str = "replica") -> Iterator[Replica]:
    script = tmp_path / "replica_processes.py"
    script.write_text(REPLICA)
    environment = {name: value for name, value in os.environ.items() if name != PARENT_VARIABLE}
    process = subprocess.Popen(
        [sys.executable, str(script), start_method, shape],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        processes = Replica(process)
    except BaseException:
        process.kill()
        raise
    try:
        yield processes
    finally:
        processes.close()


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_engine_and_worker_are_gone_soon_after_their_server_was_killed(tmp_path: Path, start_method: str) -> None:
    with replica(tmp_path, start_method) as processes:
        assert not processes.is_gone("engine", 0.2)
        processes.kill("server")
        assert processes.is_gone("engine", GONE_S)
        assert processes.is_gone("worker", GONE_S)


def test_a_worker_is_gone_soon_after_its_engine_was_killed_and_the_server_stays(tmp_path: Path) -> None:
    with replica(tmp_path, "spawn") as processes:
        processes.kill("engine")
        assert processes.is_gone("worker", GONE_S)
        assert not processes.is_gone("server", ALIVE_S)


def test_nobody_ends_while_all_live_not_even_when_a_worker_is_killed(tmp_path: Path) -> None:
    with replica(tmp_path, "spawn") as processes:
        processes.kill("worker")
        assert not processes.is_gone("engine", ALIVE_S)
        assert not processes.is_gone("server", 0.0)


def test_each_process_but_the_server_is_watched_and_once_only(tmp_path: Path) -> None:
    with replica(tmp_path, "spawn") as processes:
        assert processes.answers == {"server": (False, False), "engine": (True, False), "worker": (True, False)}


def test_a_forked_process_is_watched_although_its_parent_is_already(tmp_path: Path) -> None:
    with replica(tmp_path, "fork") as processes:
        assert processes.answers == {"server": (False, False), "engine": (True, False), "worker": (True, False)}


def test_without_a_replicas_server_nobody_is_watched_and_everybody_survives(tmp_path: Path) -> None:
    with replica(tmp_path, "spawn", "plain") as processes:
        assert set(processes.answers.values()) == {(False, False)}
        processes.kill("server")
        processes.server.wait()
        assert not processes.is_gone("engine", ALIVE_S)
        assert not processes.is_gone("worker", 0.0)


def test_a_process_that_multiprocessing_did_not_start_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT_VARIABLE, str(os.getpid()))
    assert not watch_parent()


LATE = """
import multiprocessing, os, sys, time
from replicas.parent_watch import PARENT_VARIABLE, watch_parent

def engine():
    os.write(1, f"{os.getpid()}\\n".encode())
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.01)  # still importing while the server dies
    watch_parent(lambda: (os.write(1, b"lost\\n"), os._exit(1)))
    time.sleep(600)

if __name__ == "__main__":
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    multiprocessing.get_context("fork").Process(target=engine).start()
    time.sleep(600)
"""


def test_a_process_whose_parent_died_before_the_watch_began_ends_as_well(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(LATE)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    handle = os.pidfd_open(int(process.stdout.readline()))
    try:
        process.kill()
        process.wait()
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(GONE_S * 1000)
        assert process.stdout.readline() == "lost\n"
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
        process.communicate()
