"""How much memory this host has to give."""

from pathlib import Path


def available_memory_bytes() -> int:
    """Memory that new processes of this host can take (Linux `MemAvailable`)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no MemAvailable in /proc/meminfo")
