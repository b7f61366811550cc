"""Goal: Serve's router machinery sends requests where placement says, and placement hears of all that happens.

Method: Ray's own `RequestRouter` runs in an event loop, without a cluster: only the replicas that it would call are
stand-ins, which say how many requests they have. `test_ray_serve.py` has the same on real ones.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cost_service.service_messages import ROUTING_STATS, STAMP_TENANT, ReplicaLoad

pytestmark = pytest.mark.engine  # imports Ray and vLLM

NAMES = ("a", "b")


def stats(free_tokens: int = 10_000, sequence: int = 1) -> dict[str, Any]:
    load = ReplicaLoad(
        epoch="e", sequence=sequence, num_running=0, num_waiting=0, num_blocks=20_000, num_free_blocks=free_tokens,
        block_size=1, num_waiting_tokens=0,
    )  # fmt: skip
    return {ROUTING_STATS: msgspec.to_builtins(load)}


class Replica:
    """What a router asks of a replica."""

    def __init__(self, name: str, routing_stats: dict[str, Any]) -> None:
        from ray.serve._private.common import DeploymentID
        from ray.serve.request_router import ReplicaID

        self.replica_id = ReplicaID(name, DeploymentID(name="d"))
        self.routing_stats, self.max_ongoing_requests, self.num_ongoing = routing_stats, 4, 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.num_ongoing


class Routed:
    """A router and its replicas."""

    def __init__(self) -> None:
        from ray.serve._private.common import DeploymentHandleSource, DeploymentID

        from global_scheduler.serve_router import PlacementRouter

        self.router = PlacementRouter(
            deployment_id=DeploymentID(name="d"), handle_source=DeploymentHandleSource.UNKNOWN,
            use_replica_queue_len_cache=True,
        )  # fmt: skip
        self.router.initialize_state()
        self.replicas = {name: Replica(name, stats()) for name in NAMES}
        self.num = 0

    def update(self) -> None:
        self.router.update_replicas(list(self.replicas.values()))

    def pending(self, body: Any = None) -> Any:
        from ray.serve._private.common import RequestMetadata
        from ray.serve.request_router import PendingRequest

        self.num += 1
        metadata = RequestMetadata(request_id=str(self.num), internal_request_id=str(self.num))
        return PendingRequest(args=[] if body is None else [body, None], kwargs={}, metadata=metadata)

    async def send(self, pending: Any, *, is_retry: bool = False) -> str:
        chosen = await self.router._choose_replica_for_request(pending, is_retry=is_retry)
        return str(chosen.replica_id.unique_id)

    def check(self) -> Any:
        self.router._placement.check()
        return self.router._placement


def chat(text: str, tenant: str = "t") -> Any:
    return SimpleNamespace(
        messages=[{"role": "user", "content": text}], vllm_xargs={STAMP_TENANT: tenant}, cache_salt=tenant
    )  # fmt: skip


def run(scenario: Callable[[Routed], Coroutine[Any, Any, None]]) -> None:
    async def in_a_loop() -> None:
        routed = Routed()
        routed.update()
        await scenario(routed)

    asyncio.run(asyncio.wait_for(in_a_loop(), 20))


def test_requests_at_once_are_spread_although_none_of_them_has_been_sent_yet() -> None:
    async def scenario(routed: Routed) -> None:
        sent = await asyncio.gather(*(routed.send(routed.pending(chat("Hello"))) for _ in range(8)))
        assert sorted(sent) == ["a"] * 4 + ["b"] * 4
        routed.check()

    run(scenario)


def test_what_ends_makes_room() -> None:
    async def scenario(routed: Routed) -> None:
        assert await routed.send(routed.pending(chat("Hello"))) == "a"
        routed.router.on_request_completed(routed.replicas["a"].replica_id, "1")
        assert await routed.send(routed.pending(chat("Hello"))) == "a"
        routed.check()

    run(scenario)


def test_new_statistics_are_heard_and_old_ones_are_not_heard_again() -> None:
    async def scenario(routed: Routed) -> None:
        routed.replicas["a"].routing_stats = stats(5000, sequence=2)
        routed.update()
        assert await routed.send(routed.pending(chat("Hello"))) == "b"
        heard = routed.check()._heard_s.copy()
        routed.update()
        assert (routed.check()._heard_s == heard).all()

    run(scenario)


def test_a_full_replica_is_passed_over() -> None:
    async def scenario(routed: Routed) -> None:
        routed.router.on_new_queue_len_info(routed.replicas["a"].replica_id, 4)
        routed.replicas["a"].num_ongoing = 4
        assert await routed.send(routed.pending(chat("Hello"))) == "b"
        await asyncio.sleep(0)
        assert routed.check()._sent.tolist() == [0.0, 6.0], "it counts where it went"

    run(scenario)


def test_a_refused_request_is_placed_again() -> None:
    async def scenario(routed: Routed) -> None:
        pending = routed.pending(chat("Hello"))
        assert await routed.send(pending) == "a"
        routed.router.on_request_completed(routed.replicas["a"].replica_id, "1")
        assert await routed.send(pending, is_retry=True) == "a"
        assert routed.check()._sent.sum() == 6.0

    run(scenario)


def test_a_client_that_leaves_before_its_request_is_sent_leaves_nothing() -> None:
    async def scenario(routed: Routed) -> None:
        for each in routed.replicas.values():
            each.num_ongoing = 4
            routed.router.on_new_queue_len_info(each.replica_id, 4)
        waiting = asyncio.create_task(routed.send(routed.pending(chat("Hello"))))
        await asyncio.sleep(0.1)
        assert not waiting.done(), "all replicas are full"
        waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.sleep(0)
        assert routed.check()._sent.sum() == 0

    run(scenario)


def test_requests_go_to_the_replica_that_is_left() -> None:
    async def scenario(routed: Routed) -> None:
        assert await routed.send(routed.pending(chat("Hello"))) == "a"
        routed.router.on_replica_actor_died(routed.replicas.pop("a").replica_id)
        assert await routed.send(routed.pending(chat("Hello"))) == "b"
        routed.update()
        assert await routed.send(routed.pending(chat("Hello"))) == "b"
        routed.check()

    run(scenario)


@pytest.mark.parametrize("said", [{}, {ROUTING_STATS: None}, {ROUTING_STATS: {"epoch": 3}}])
def test_a_replica_that_says_nothing_sensible_is_served_all_the_same(
    said: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(routed: Routed) -> None:
        routed.replicas["c"] = Replica("c", said)
        routed.update()
        chosen = [await routed.send(routed.pending(chat("Hello"))) for _ in range(6)]
        assert sorted(chosen) == ["a", "a", "b", "b", "c", "c"]

    with caplog.at_level(logging.WARNING, "ray.serve"):
        run(scenario)


def test_a_call_without_a_body_is_placed_too() -> None:
    async def scenario(routed: Routed) -> None:
        assert [await routed.send(routed.pending()) for _ in range(2)] == ["a", "b"]

    run(scenario)


def test_tenant_size_and_beginning_are_read_from_both_kinds_of_bodies() -> None:
    from cluster.ray_internals import ChatCompletionRequest, CompletionRequest
    from global_scheduler.serve_router import read_body
    from replicas.request_stamp import make_stamp

    ours = {
        "model": "m", "cache_salt": "salt", "vllm_xargs": make_stamp(tenant="acme", median_tokens=1, upper_tokens=2)
    }  # fmt: skip
    text = "All of this is the same. " * 80
    messages = [{"role": "system", "content": text}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    tenant, num_tokens, marks = read_body(ChatCompletionRequest.model_validate(ours | {"messages": messages}))
    assert (tenant, num_tokens) == ("acme", len(text) // 4 + 1 + 2 * 4)
    assert len(marks) > 3
    other = [*messages[:1], {"role": "user", "content": "Something else"}]
    assert read_body(ChatCompletionRequest.model_validate(ours | {"messages": other}))[2] == marks
    salted = ours | {"cache_salt": "other", "messages": messages}
    assert not {*read_body(ChatCompletionRequest.model_validate(salted))[2]} & {*marks}
    tokens = read_body(CompletionRequest.model_validate(ours | {"prompt": [[7] * 300, [8] * 300]}))
    assert (tokens[0], tokens[1], len(tokens[2])) == ("acme", 600, 4)


def test_who_sends_no_stamp_is_nobody() -> None:
    from global_scheduler.serve_router import read_body

    assert read_body(None) == ("", 1, [])
    assert read_body(SimpleNamespace(prompt="", vllm_xargs=None)) == ("", 1, [])
    assert read_body(SimpleNamespace(prompt="word word")) == ("", 3, [])
