"""What devices can do: peaks from datasheets, what of them is really reached, and how uncertain that is.

Method: a datasheet's peaks times the shares that measured GPUs reach (`REACHED`). The shares come from the profiles of an
RTX PRO 6000 and an H100: steps predicted with them and nothing else are 15 % off in the mean on the first, 34 % on the
second (an old profiler's, bound by launches); nine of ten measured steps lie within the factor `UNCERTAINTY`.
`python -m cost_service evaluate --profile DIR --cold` says it of any profile.
"""

from dataclasses import dataclass
from typing import Self

UNCERTAINTY = 1.75
"""A step takes between 1 / this and this times what datasheet and shares say, nine times of ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasheet:
    """Peaks of one device, as its maker publishes them."""

    name: str
    """How vLLM's device name or a profile's folder contains it."""

    flops_per_s: float
    """Dense, bf16 products with fp32 sums."""

    bytes_per_s: float
    """Device memory."""

    host_bytes_per_s: float
    """To host memory, one direction."""

    memory_gib: float = 80.0
    rank_bytes_per_s: float | None = None
    """NVLink to other devices, one direction; None: they talk over the link to the host."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name=X,flops=3e14,bytes=2e12,host=3.2e10`.

        Raises:
            ValueError: A key is missing, unknown or repeated, or a value is no number above 0.
        """
        keys = {"name": "name", "flops": "flops_per_s", "bytes": "bytes_per_s", "host": "host_bytes_per_s"}
        pairs = [part.partition("=") for part in text.split(",")]
        given = {key: value for key, _, value in pairs}
        if set(given) != set(keys) or len(pairs) != len(keys):
            raise ValueError(
                f"A datasheet must have each of {', '.join(keys)} once, such as name=X,flops=3e14: {text!r}."
            )
        values: dict[str, float] = {}
        for key in ("flops", "bytes", "host"):
            try:
                values[keys[key]] = float(given[key])
            except ValueError:
                values[keys[key]] = 0.0
            if not 0 < values[keys[key]] < float("inf"):
                raise ValueError(f"{key} of a datasheet must be a number above 0, per second: it is {given[key]!r}.")
        if not given["name"]:
            raise ValueError("name of a datasheet must not be empty.")
        return cls(name=given["name"], **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Rates that one rank really reaches."""

    name: str
    flops_per_s: float
    """Matrix products of many rows."""

    bytes_per_s: float
    """Weights read from device memory."""

    attention_flops_per_s: float
    """Of prefills."""

    kv_bytes_per_s: float
    """Read by decodes."""

    launch_s: float
    """Of one operator."""

    prefill_fixed_s: float
    """What a prefill adds to a step of decodes whatever its size (on GPUs the step leaves its captured graph)."""

    copy_bytes_per_s: float
    """Between device and host memory, one direction, in pieces of a KV block."""

    copy_fixed_s: float
    """To hand one batch of copies over."""

    rank_bytes_per_s: float
    """Between ranks, as an all-reduce sees it."""

    rank_latency_s: float
    """Of one all-reduce."""

    memory_gib: float
    copies_stall: bool
    """Whether the engine waits for its copies (CPU), or they run beside it (GPU)."""

    @classmethod
    def of_datasheet(cls, sheet: Datasheet) -> Self:
        """What a GPU is expected to reach of its peaks."""
        return cls(
            name=sheet.name,
            flops_per_s=REACHED["flops"] * sheet.flops_per_s,
            bytes_per_s=REACHED["bytes"] * sheet.bytes_per_s,
            attention_flops_per_s=REACHED["attention_flops"] * sheet.flops_per_s,
            kv_bytes_per_s=REACHED["kv_bytes"] * sheet.bytes_per_s,
            launch_s=4e-6,
            prefill_fixed_s=2e-3,
            copy_bytes_per_s=REACHED["host_bytes"] * sheet.host_bytes_per_s,
            copy_fixed_s=5e-3,
            rank_bytes_per_s=REACHED["rank_bytes"] * (sheet.rank_bytes_per_s or sheet.host_bytes_per_s),
            rank_latency_s=1.5e-5 if sheet.rank_bytes_per_s else 4e-5,
            memory_gib=sheet.memory_gib,
            copies_stall=False,
        )


REACHED = {
    "flops": 0.65,
    "bytes": 0.85,
    "attention_flops": 0.4,
    "kv_bytes": 0.45,
    "host_bytes": 0.78,
    "rank_bytes": 0.4,
}
"""Shares of the peaks; copies as measured with blocks of 0.5 to 2 MB over PCIe, all-reduces as a recorded run of two RTX PRO
6000 shows them (`python -m cluster validate`)."""

_ROWS = (
    ("A10G", 24, 70e12, 0.6e12, 32e9, None),
    ("A100", 80, 312e12, 2.04e12, 32e9, 300e9),
    ("L4", 24, 121e12, 0.3e12, 32e9, None),
    ("L40S", 48, 362e12, 0.864e12, 32e9, None),
    ("H100", 80, 989e12, 3.35e12, 64e9, 450e9),
    ("H200", 141, 989e12, 4.8e12, 64e9, 450e9),
    ("B200", 180, 2250e12, 8.0e12, 64e9, 900e9),
    ("RTXPRO6000", 96, 504e12, 1.6e12, 64e9, None),
)
DATASHEETS = tuple(
    Datasheet(
        name=name, memory_gib=memory_gib, flops_per_s=flops, bytes_per_s=moved, host_bytes_per_s=host, rank_bytes_per_s=rank
    )
    for name, memory_gib, flops, moved, host, rank in _ROWS
)  # fmt: skip
"""Source: NVIDIA's datasheets of these products (SXM where there are several)."""

CPU = Hardware(
    # One thread of a server core without matrix units; its memory copy is what another core leaves.
    name="cpu", flops_per_s=3e10, bytes_per_s=1e10, attention_flops_per_s=3e10, kv_bytes_per_s=3e9, launch_s=2e-5,
    prefill_fixed_s=2e-3, copy_bytes_per_s=4e9, copy_fixed_s=2e-4,
    rank_bytes_per_s=4e9, rank_latency_s=1e-4, memory_gib=16.0, copies_stall=True,
)  # fmt: skip

HARDWARE = {CPU.name: CPU} | {sheet.name: Hardware.of_datasheet(sheet) for sheet in DATASHEETS}
"""What is known by name."""

UNKNOWN = HARDWARE["A10G"]
"""The slowest known GPU stands for one that is not known."""


def known_hardware(device_name: str) -> Hardware | None:
    """The hardware whose name is the longest one in a device's name; None where none is."""
    squeezed = device_name.replace(" ", "")
    return max(
        (hardware for name, hardware in HARDWARE.items() if name in squeezed),
        key=lambda one: len(one.name),
        default=None,
    )
