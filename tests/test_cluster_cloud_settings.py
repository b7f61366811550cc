"""Goal: what Ray and the clouds would refuse late, or ignore, of a machine's settings is refused here.

Method: names that Ray's code reads of `provider`, looked up in its source; settings with one fault.
"""

import importlib.util
import re
from pathlib import Path

import pytest

from cluster.cloud_settings import PROVIDER_SETTINGS, PROVIDERS, check_node, check_provider

READ = re.compile(r"provider(?:_config)?\"?\]?(?:\.get\(|\[)\s*\"([a-z]\w+)\"")

MADE_BY_RAY = {"list_of_node_ips"}
"""What its coordinator server puts there itself."""


def autoscaler() -> Path:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "autoscaler"


@pytest.mark.parametrize("kind", ["aws", "gcp", "local"])
def test_all_that_ray_reads_of_a_provider_is_known(kind: str) -> None:
    read = {
        name for path in (autoscaler() / "_private" / kind).rglob("*.py") for name in READ.findall(path.read_text())
    }
    assert read, "the source is no longer what this looks for"
    assert read - MADE_BY_RAY <= PROVIDER_SETTINGS[kind]


def test_the_types_of_providers_are_rays() -> None:
    source = (autoscaler() / "_private/providers.py").read_text()
    table = source[source.index("_NODE_PROVIDERS = {") :]
    assert set(re.findall(r'"(\w+)":', table[: table.index("}")])) == PROVIDERS


def test_a_wrong_provider_is_named() -> None:
    with pytest.raises(ValueError, match=r"^provider\.type gpc is none of Ray's: did you mean gcp\?$"):
        check_provider({"type": "gpc"})
    with pytest.raises(ValueError, match=r"^Unknown setting provider\.regoin: did you mean region\?$"):
        check_provider({"type": "aws", "regoin": "x"})
    check_provider({"type": "azure", "anything": "else"})


def test_a_wrong_setting_of_a_machine_is_named() -> None:
    with pytest.raises(ValueError, match=r"^Unknown setting head\.InstanceTyp: did you mean InstanceType\?$"):
        check_node("aws", {"InstanceTyp": "m5.xlarge"}, "head.")
    check_node("aws", {"InstanceType": "m5.xlarge", "SubnetIds": []}, "head.")
    check_node("vsphere", {"anything": "else"}, "head.")
