"""vLLM's general plugin: runs first in every engine and worker process of this environment, before the model loads."""

from replicas.parent_watch import watch_parent


def register() -> None:
    """Entry point `vllm.general_plugins`. Does nothing unless a replica's server started this process."""
    watch_parent()
