"""A Redis of a test's own, on a free port, with a password, in a folder of the test's."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from cluster.config import StateArgs
from tests.cluster_runs import free_port

SERVER = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(SERVER is None, reason="no redis-server here: apt-get install redis-server")
PASSWORD = "a-password-of-tests-alone"
PREFIX = "adaptivellm:"


class RedisServer:
    """Handle of a `redis-server`. Whoever makes one ends it: `with redis_server(folder) as server`."""

    def __init__(self, folder: Path, *options: str, password: str = PASSWORD) -> None:
        self.folder, self.options, self.password, self.port = folder, options, password, free_port()
        self.password_file = folder / "password"
        self.password_file.touch(mode=0o600)
        self.password_file.write_text(password + "\n")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start, and wait until it answers."""
        assert SERVER is not None
        command = [
            SERVER, "--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", self.password,
            "--dir", str(self.folder), "--save", "", "--appendonly", "no", *self.options,
        ]  # fmt: skip
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(lambda: self.process is None or self.process.poll() is not None or self._answers(), 20)
        assert self.process.poll() is None, (self.folder / "redis.log").read_text()

    def kill(self) -> None:
        """End it as a power cut does; what it had in memory is lost."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.pid, signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def pause(self) -> None:
        """Let it hang, with its connections open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def client(self) -> Any:
        """A client that may do everything."""
        return redis.Redis(port=self.port, password=self.password, socket_timeout=5)

    def state(self, **changes: Any) -> StateArgs:
        """Settings with which the product reaches it."""
        settings: dict[str, Any] = {
            "redis_url": f"redis://127.0.0.1:{self.port}/0", "redis_password_file": str(self.password_file),
            "redis_timeout_s": 0.5,
        }  # fmt: skip
        return StateArgs(**settings | changes)

    def _answers(self) -> bool:
        try:
            return bool(self.client().ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[RedisServer]:
    """A Redis that runs; ended at the end."""
    server = RedisServer(folder, *options)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def wait_until(condition: Callable[[], Any], limit_s: float = 30.0) -> float:
    """Wait for a condition; return after how many seconds it held, and fail if it never does."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < limit_s, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began_s
