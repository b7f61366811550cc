"""Looks for published weaknesses in what is installed (`pip-audit`); part of `make check`.

Rules: an advisory that nobody has reviewed fails the check; a reviewed one is listed below with the reason. Where the
advisory service does not know a single package (an index mirror without advisories), that is said, and is not a pass.
"""

import json
import subprocess
import sys

REVIEWED = {
    "CVE-2026-116180": "vllm: the ingress refuses prompt_logprobs and echo with logprobs; the connector loads nothing then",
    "CVE-2026-114049": "vllm: the ingress refuses allowed_token_ids",
    "CVE-2026-105757": "vllm: the ingress refuses structured output and tools",
    "CVE-2026-115911": "vllm: the ingress refuses chat templates in requests",
    "PYSEC-2026-4349": "vllm: the ingress refuses chat templates in requests",
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
    """Run the audit; 0 unless an advisory is not reviewed."""
    command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "--format", "json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(answer.stdout)["dependencies"]
    except ValueError:
        print("pip-audit: the advisory service cannot be reached; nothing was audited.")
        return 0
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        print(f"pip-audit: the service here knows none of {len(packages)} packages; nothing was audited.")
        return 0
    unreviewed = 0
    for package in audited:
        for advisory in package["vulns"]:
            names = {advisory["id"], *advisory.get("aliases", [])}
            if not names & REVIEWED.keys():
                unreviewed += 1
                fixed = ", ".join(advisory["fix_versions"]) or "no release yet"
                print(f"{package['name']} {package['version']}: {advisory['id']} (fixed in {fixed}) is not reviewed")
    print(f"pip-audit: {len(audited)} packages audited, {unreviewed} advisories not reviewed.")
    return 1 if unreviewed else 0


if __name__ == "__main__":
    sys.exit(main())
