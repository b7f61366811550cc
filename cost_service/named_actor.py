"""Actors of which the cluster has one each, found by name, and the loop of those who exchange with them (shell).

Rules:
- Detached, restarted for ever, no CPU of its own: an actor comes back with what its store holds.
- With a store that all nodes share it runs on any node, and comes back on another one when its node is lost. A store that
  is a file keeps it on the head node: wherever else it came back it would find another file.
- Nobody waits for one on a request's path or in an engine's step: whoever exchanges does so beside them.
- It may be away at any time: who exchanges goes on with what it has, says so once, and tries again.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import ray

from cost_service.store import Store

logger = logging.getLogger("ray.serve")

NAMESPACE = "adaptivellm"
TIMEOUT_S = 5.0

HEAD = {"node:__internal_head__": 0.001}
"""A little of what Ray gives the head node alone."""


def start_actor(cls: type, name: str, store: Store, **options: Any) -> Any:
    """Start an actor of a class where there is none of that name yet; returns its handle at once.

    Args:
        cls: Made with the store alone.
        store: Travels to the actor; where it is a file, it is one of the head node.
        options: Ray's, beyond those that all our actors have.
    """
    ours = {
        "name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True, "num_cpus": 0,
        "max_restarts": -1, "resources": {} if store.is_shared else HEAD,
    }  # fmt: skip
    return ray.remote(cls).options(**ours, **options).remote(store)


def log_as(name: str) -> None:
    """Let the process of an actor of that name say who speaks and when, in the log that Ray's dashboard shows for it."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(levelname)s %(asctime)s {name} -- %(message)s"))
    logger.handlers, logger.propagate = [handler], False  # Serve sets this logger up in its own processes alone
    logger.setLevel(logging.INFO)
    logger.info("Process %d.", os.getpid())


def find_actor(name: str) -> Any | None:
    """The actor's handle; None while there is none. Asks the cluster: not for an event loop."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


async def exchange_for_ever(
    name: str, exchange: Callable[[Any], Awaitable[None]], say_degraded: Callable[[bool], None], *,
    interval_s: Callable[[], float], kept: str,
) -> NoReturn:  # fmt: skip
    """Call `exchange` with the actor of that name again and again, one call at a time, whatever happens.

    Args:
        say_degraded: Called with whether the actor does not answer, when that changes.
        interval_s: Asked for the seconds until the next call.
        kept: What stays as it is while the actor does not answer.
    """
    actor, degraded = None, False
    while True:
        await asyncio.sleep(interval_s())
        try:
            if actor is None:
                actor = await asyncio.to_thread(find_actor, name)
                if actor is None:
                    raise LookupError("there is none")
            await asyncio.wait_for(exchange(actor), TIMEOUT_S)
            now_degraded = False
        except Exception as error:  # Ray has many for an actor that is away; none may end this
            actor, now_degraded = None, True
            if not degraded:
                logger.warning("The actor %s does not answer (%s): %s.", name, type(error).__name__, kept)
        if now_degraded != degraded:
            degraded = now_degraded
            say_degraded(degraded)
