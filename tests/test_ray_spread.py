"""Goal: replicas that take a resource of which every node has one are spread, and a further one waits for another node.

Method: a Ray cluster of two nodes in a process of its own, and placement groups as Serve makes them of our options; no
engine.
"""

import json
import subprocess
import sys

import pytest

from cluster.config import AppArgs
from tests.cluster_runs import environment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PLACE = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table

bundles, num_groups = json.loads(sys.argv[1]), int(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "resources": {"replica_slot": 1}})
cluster.add_node(num_cpus=8, resources={"replica_slot": 1})
ray.init(cluster.address, log_to_driver=False)
groups = [placement_group(bundles) for _ in range(num_groups)]
ready, _ = ray.wait([group.ready() for group in groups], num_returns=num_groups, timeout=10)
table = placement_group_table()
print(json.dumps([sorted(set(one["bundles_to_node_id"].values())) for one in table.values() if one["state"] == "CREATED"]))
ray.shutdown()
cluster.shutdown()
"""


def nodes_of(bundles: list[dict[str, float]], num_groups: int) -> list[list[str]]:
    """Nodes of each placement group that found room."""
    done = subprocess.run(
        [sys.executable, "-c", PLACE, json.dumps(bundles), str(num_groups)], env=environment(), capture_output=True,
        text=True, check=True, timeout=200,
    )  # fmt: skip
    placed: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return placed


def test_two_of_three_replicas_find_a_node_of_their_own_and_the_third_waits() -> None:
    from ray.llm._internal.serve.core.server.llm_server import _merge_replica_actor_and_child_actor_bundles

    from cluster.app import make_llm_config

    settings = AppArgs.from_mapping({"replicas": {"kv_cache_bytes": 64 << 20, "resources": {"replica_slot": 1.0}}})
    config = make_llm_config(settings, None)
    options, group = config.deployment_config["ray_actor_options"], config.placement_group_config
    assert group is not None
    bundles = _merge_replica_actor_and_child_actor_bundles(
        group["bundles"], {"CPU": options["num_cpus"], **options["resources"]}
    )
    placed = nodes_of(bundles, 3)
    assert len(placed) == 2
    assert len({node for nodes in placed for node in nodes}) == 2
