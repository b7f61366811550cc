"""What engines measure and costs are learned from: small typed values, JSON on the way to the cost service."""

from typing import Literal

import msgspec


class PrefillSample(msgspec.Struct, frozen=True, kw_only=True, tag="prefill", forbid_unknown_fields=True):
    """One step's prefills, beside its decodes."""

    num_tokens: int
    attention: float
    """Sum over the prefills of (n + r)^2 - r^2, with n new tokens behind r cached ones."""

    num_decodes: int
    seconds: float
    """What the step took longer than one of the decodes alone."""


class CopySample(msgspec.Struct, frozen=True, kw_only=True, tag="copy", forbid_unknown_fields=True):
    """Copies of one direction that were made together."""

    direction: Literal["out", "in"]
    num_blocks: int
    seconds: float
    """Taken from the engine, which waited."""


class LinkSample(msgspec.Struct, frozen=True, kw_only=True, tag="link", forbid_unknown_fields=True):
    """One transfer beside the engine, from when the link was free for it."""

    direction: Literal["out", "in"]
    num_blocks: int
    shared: float = 0.0
    """Share of its time for which the other direction carried something too."""

    seconds: float


class StepSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One whole step of an engine."""

    num_decodes: int
    decode_tokens: int
    """KV tokens that all decodes read together, their own included."""

    prefills: tuple[tuple[int, int], ...]
    """Of each prefill the tokens cached before it, and the new ones."""

    seconds: float
    """From step to step, without copies that the engine waited for."""


Sample = PrefillSample | CopySample | LinkSample
"""Any of those that a running engine tells."""
