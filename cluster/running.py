"""Talks to the replicas of the applications that run on a Ray cluster, for commands of people and scripts."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SERVER = "AdaptiveLLMServer:"
"""What the names of deployments of replicas begin with."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Join the Ray cluster for the duration of the block.

    Raises:
        LookupError: None answers; one sentence with the mend.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    try:
        ray.init(address=address, namespace="serve", log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError):
        raise LookupError("no Ray cluster answers: start one with `make serve`, or give --address.") from None
    try:
        yield
    finally:
        ray.shutdown()


def ask_replicas(method: str, *arguments: Any) -> list[dict[str, Any]]:
    """Call a method of every replica of all our applications; each answer with its application and the time it came.

    Raises:
        LookupError: No application of ours is running, or a replica does not answer.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    found = []
    for application, status in _applications().items():
        for deployment in status.deployments:
            if not deployment.startswith(SERVER):
                continue
            handle = serve.get_deployment_handle(deployment, application)
            try:
                answers = handle.broadcast(method, *arguments).results(timeout_s=10)
            except (RayError, RayServeException, TimeoutError) as error:
                raise LookupError(f"a replica does not answer ({type(error).__name__}): try again.") from None
            seen_s = time.monotonic()
            found += [{**answer, "application": application, "seen_s": seen_s} for answer in answers]
    if not found:
        raise LookupError("no application of ours is running: start one with `make serve`.")
    return found


def ask_deployments() -> list[dict[str, Any]]:
    """What Serve's controller says of our deployments of replicas.

    Returns:
        Application, deployment, `target` number of replicas, `states` of those that are there, and what our policy scales
        them by in `autoscaling`; None where their number is fixed.

    Raises:
        LookupError: It does not answer.
    """
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client  # not of `ray_internals`, which loads vLLM: seconds for a look

    try:
        details = _get_global_client().get_serve_details()
    except RayError as error:
        raise LookupError(f"Serve does not answer ({type(error).__name__}): try again.") from None
    found = []
    for application, of_application in details["applications"].items():
        for deployment, one in of_application["deployments"].items():
            if not deployment.startswith(SERVER):
                continue
            config = one["deployment_config"].get("autoscaling_config") or {}
            found.append(
                {
                    "application": application,
                    "deployment": deployment,
                    "target": one["target_num_replicas"],
                    "states": [_text(replica["state"]) for replica in one["replicas"]],
                    "autoscaling": config.get("policy", {}).get("policy_kwargs") or None,
                }
            )
    return found


def not_running() -> list[str]:
    """A sentence for each deployment of running applications whose replicas do not all run.

    Raises:
        LookupError: Serve does not answer.
    """
    return [
        f"{deployment} of {application}: {', '.join(f'{num} {state}' for state, num in sorted(states.items()))}."
        for application, status in _applications().items()
        for deployment, info in status.deployments.items()
        if set(states := {_text(state): num for state, num in info.replica_states.items()}) != {"RUNNING"}
    ]


def _text(state: Any) -> str:
    """Serve's name of a state, whether it comes as text or as the enumeration's member."""
    return str(getattr(state, "value", state))


def _applications() -> Mapping[str, Any]:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        return serve.status().applications
    except (RayError, RayServeException, TimeoutError) as error:
        raise LookupError(f"Serve does not answer ({type(error).__name__}): try again.") from None


def ask_actor(name: str, method: str, *arguments: Any, **keywords: Any) -> Any:
    """Call a method of one of the cluster's actors (`cost_service.named_actor`).

    Raises:
        LookupError: There is none, or it does not answer.
    """
    import ray

    from cost_service.named_actor import find_actor

    actor = find_actor(name)
    if actor is None:
        raise LookupError(f"no actor {name} is running: start an application with `make serve`.")
    try:
        return ray.get(getattr(actor, method).remote(*arguments, **keywords), timeout=10)
    except ray.exceptions.RayError as error:
        raise LookupError(f"the actor {name} does not answer ({type(error).__name__}): try again.") from None
