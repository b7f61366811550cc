"""What a benchmark has done so far, kept beside its result file so that one which was stopped can go on.

Rules:
- JSON lines: first what is measured, then every finished part. A part that was cut off while it was written is not there.
- It belongs to exactly one plan; another plan's file is refused, and it is removed when the result is written.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Progress:
    """Finished parts by name; without a path they are only kept in memory."""

    def __init__(self, path: Path | None, plan: object) -> None:
        """Read what is there.

        Args:
            path: File of the parts.
            plan: What is measured, as JSON has it: the same text means the same plan.

        Raises:
            ValueError: The file is of another plan, or none of this kind.
        """
        self._path, self._parts = path, dict[str, Any]()
        head = json.dumps({"plan": hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()})
        if path is None:
            return
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        if not lines:
            path.write_text(head + "\n")
        elif lines[0] != head + "\n":
            raise ValueError(f"{path} holds parts of another benchmark: remove it, or name another --json.")
        for line in lines[1:]:
            if line.endswith("\n"):
                self._parts.update(json.loads(line))
        if lines and not lines[-1].endswith("\n"):  # cut off: what comes next begins on a line of its own
            path.write_text("".join(lines[:-1]))

    @property
    def num_parts(self) -> int:
        """Parts that are done."""
        return len(self._parts)

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Return a part that is done, else do it and keep it; a value of plain JSON types."""
        if name not in self._parts:
            value = json.loads(json.dumps(work()))  # the same whether it was kept or done now
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps({name: value}) + "\n")
            self._parts[name] = value
        return self._parts[name]

    def has(self, name: str) -> bool:
        """Whether a part is done."""
        return name in self._parts

    def remove(self) -> None:
        """Forget all parts: the result is written."""
        self._parts.clear()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
