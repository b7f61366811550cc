"""What `ray start` takes on its command line, and hands on to it by a RayService (pure).

Rules:
- Ray's own command refuses an unknown option, but only on the machine, after `ray up` has made it.
- The names stand here, for importing Ray takes seconds; `tests/test_cluster_ray_start.py` holds them to Ray's own.
"""

import re
from collections.abc import Iterable

from cluster.settings_errors import mend_of_name

OPTIONS = {
    "address", "autoscaling-config", "block", "cgroup-path", "dashboard-agent-grpc-port", "dashboard-agent-listen-port",
    "dashboard-host", "dashboard-port", "disable-usage-stats", "enable-object-reconstruction",
    "enable-resource-isolation", "head", "include-dashboard", "include-log-monitor", "labels", "labels-file",
    "log-color", "log-style", "max-worker-port", "memory", "metrics-export-port", "min-worker-port", "no-monitor",
    "no-redirect-output", "node-ip-address", "node-manager-port", "node-name", "num-cpus", "num-gpus",
    "object-manager-port", "object-spilling-directory", "object-store-memory", "plasma-directory", "port",
    "proxy-server-url", "ray-client-server-port", "ray-debugger-external", "redis-password", "redis-shard-ports",
    "redis-username", "resources", "runtime-env-agent-port", "system-config", "system-reserved-cpu",
    "system-reserved-memory", "temp-dir", "tracing-startup-hook", "verbose", "worker-port-list",
}  # fmt: skip

_START = re.compile(r"\bray start\b([^;&|]*)")
_OPTION = re.compile(r"(?<!\S)--([\w-]+)")


def check_start_command(place: str, command: str) -> None:
    """Hold every `ray start` in a shell command to the options that it knows.

    Raises:
        ValueError: One is unknown, with the one that is probably meant.
    """
    for words in _START.findall(command):
        check_start_options(f"{place}: --", _OPTION.findall(words))


def check_start_options(place: str, given: Iterable[str]) -> None:
    """Hold names of options to those that `ray start` knows.

    Args:
        place: Where they stand; a name follows it at once.

    Raises:
        ValueError: One is unknown, with the one that is probably meant.
    """
    for name in given:
        if name.replace("_", "-") != name or name not in OPTIONS:
            raise ValueError(f"{place}{name} is no option of `ray start`: {mend_of_name(name, sorted(OPTIONS))}")
