"""What a simulated cluster asks of whomever its replicas exchange reports with."""

from typing import Any, Protocol

from cluster.simulated_replica import Replica


class Exchange(Protocol):
    """Whom the replicas exchange reports with: the fairness scheduler. What is in a message is its own affair."""

    def up(self, replica: Replica) -> None:
        """A replica has come up, with a fresh engine."""
        ...

    def down(self, replica: Replica) -> None:
        """A replica has crashed, or was scaled away."""
        ...

    def report(self, replica: Replica, now_s: float) -> Any:
        """What a replica says now."""
        ...

    def read(self, message: Any, now_s: float) -> Any:
        """A message has arrived, maybe after younger ones; return the answer, or None."""
        ...

    def learn(self, replica: Replica, answer: Any) -> None:
        """An answer has arrived at the life of the replica that it is for, maybe after younger ones."""
        ...
