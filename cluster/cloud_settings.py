"""The settings of machines that a cloud takes in a file for `ray up`: `provider` and `node_config` (pure).

Rules:
- Ray's schema leaves both open, and hands `node_config` to the cloud as it is: a wrong name is found there, or never. Names
  are Ray 2.60's, and those of EC2's `RunInstances` and Compute Engine's `instances.insert`.
- A cloud without a table here is not looked into.
"""

from collections.abc import Mapping
from typing import Any

from cluster.settings_errors import mend_of_name, refuse_unknown

PROVIDERS = {
    "local", "aws", "gcp", "azure", "vsphere", "kuberay", "aliyun", "external", "spark", "readonly", "fake_multinode",
    "fake_multinode_docker",
}  # fmt: skip
"""Ray's types."""

PROVIDER_SETTINGS = {
    "local": {"type", "head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
    "aws": {
        "type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "use_external_head_ip",
        "key_pair", "security_group", "cloudwatch", "aws_credentials", "disable_node_updaters",
        "disable_launch_config_check", "foreground_node_launch", "worker_liveness_check", "worker_rpc_drain",
    },
    "gcp": {
        "type", "region", "availability_zone", "project_id", "cache_stopped_nodes", "use_internal_ips",
        "use_external_head_ip", "gcp_credentials", "disable_node_updaters", "disable_launch_config_check",
        "foreground_node_launch", "worker_liveness_check", "worker_rpc_drain",
    },
}  # fmt: skip
"""Type to what Ray reads of `provider`."""

NODE_SETTINGS = {
    "aws": {
        "AdditionalInfo", "BlockDeviceMappings", "CapacityReservationSpecification", "ClientToken", "CpuOptions",
        "CreditSpecification", "DisableApiStop", "DisableApiTermination", "DryRun", "EbsOptimized",
        "ElasticGpuSpecification", "ElasticInferenceAccelerators", "EnablePrimaryIpv6", "EnclaveOptions",
        "HibernationOptions", "IamInstanceProfile", "ImageId", "InstanceInitiatedShutdownBehavior",
        "InstanceMarketOptions", "InstanceType", "Ipv6AddressCount", "Ipv6Addresses", "KernelId", "KeyName",
        "LaunchTemplate", "LicenseSpecifications", "MaintenanceOptions", "MaxCount", "MetadataOptions", "MinCount",
        "Monitoring", "NetworkInterfaces", "NetworkPerformanceOptions", "Operator", "Placement",
        "PrivateDnsNameOptions", "PrivateIpAddress", "RamdiskId", "SecurityGroupIds", "SecurityGroups", "SubnetId",
        "SubnetIds", "TagSpecifications", "UserData",
    },
    "gcp": {
        "advancedMachineFeatures", "canIpForward", "confidentialInstanceConfig", "deletionProtection", "description",
        "disks", "displayDevice", "guestAccelerators", "hostname", "instanceEncryptionKey", "keyRevocationActionType",
        "labels", "machineType", "metadata", "minCpuPlatform", "name", "networkInterfaces",
        "networkPerformanceConfig", "params", "privateIpv6GoogleAccess", "reservationAffinity", "resourcePolicies",
        "scheduling", "serviceAccounts", "shieldedInstanceConfig", "sourceInstanceTemplate", "sourceMachineImage",
        "tags",
    },
}  # fmt: skip
"""Type to what a machine is made of. `SubnetIds` is Ray's."""


def check_provider(provider: Mapping[str, Any]) -> None:
    """Refuse a provider that Ray does not know, or a setting of it that nobody reads.

    Raises:
        ValueError: One sentence with the mend.
    """
    kind = provider.get("type")
    if kind not in PROVIDERS:
        raise ValueError(f"provider.type {kind} is none of Ray's: {mend_of_name(kind, sorted(PROVIDERS))}")
    if known := PROVIDER_SETTINGS.get(kind):
        refuse_unknown(provider, known, "provider.")


def check_node(kind: str, node: Mapping[str, Any], place: str) -> None:
    """Refuse settings of a machine that its cloud does not take.

    Args:
        kind: The provider's type.
        place: Where they stand, with a point at the end.

    Raises:
        ValueError: One sentence with the mend.
    """
    if known := NODE_SETTINGS.get(kind):
        refuse_unknown(node, known, place)
