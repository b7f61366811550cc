"""Seconds of an engine's step on a GPU as the sum of its operators, learned from profiles of that GPU.

Data flow: profiles -> `AttentionTime` and `OperatorTime` (one of each per GPU, for all models) -> sum over a model's
operators and layers. The host's own work is not in it: on a GPU it runs ahead, or is captured.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cost_service.attention_time import AttentionShape, AttentionTime, AttentionWork
from cost_service.hardware import Hardware
from cost_service.model_shape import Attention, ModelShape
from cost_service.operator_time import OperatorTime
from cost_service.operators import COLLECTIVE, HALF, Batch, Operator, Precision, dense_operators
from cost_service.profiles import AttentionRows, Profile
from cost_service.residual import Estimate

Array = NDArray[np.float64]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """A profile with the shape of what it measured."""

    profile: Profile
    shape: ModelShape

    @classmethod
    def of(cls, profile: Profile) -> "MeasuredModel":
        """Read the profile's model.

        Raises:
            ValueError: Its config.json lacks a size.
        """
        source = f"The config.json of {profile.folder}"
        return cls(profile, ModelShape.from_config(profile.config, source=source))

    @property
    def name(self) -> str:
        """GPU, model and ranks."""
        model = self.profile.config.get("_name_or_path") or self.profile.model
        return f"{self.profile.hardware} {model} tp{self.profile.parallelism}"

    @property
    def operators(self) -> list[tuple[Operator, Array, Array]]:
        """Operators that were measured and that the model has, with rows and seconds of a call."""
        own = {one.name: one for one in dense_operators(self.shape, parallelism=self.profile.parallelism)}
        if foreign := sorted(set(self.profile.operators) - set(own)):
            logger.warning(
                "%s has operators that its model does not have: %s.", self.profile.folder, ", ".join(foreign)
            )
        return [(own[name], *self.profile.operators[name]) for name in own if name in self.profile.operators]

    @property
    def attention(self) -> tuple[AttentionShape, AttentionWork, Array] | None:
        """Attention as it was measured, of the model's first kind of layer; None where it was not."""
        rows = self.profile.attention
        if rows is None:
            return None
        return self.attention_shape, attention_grid(rows), rows.seconds

    @property
    def attention_shape(self) -> AttentionShape:
        """Attention of the model's first kind of layer, which is what profilers measure."""
        (attention, _), *_ = self.shape.layers
        return attention_shape(attention, self.profile.parallelism)


def attention_shape(attention: Attention, parallelism: int, precision: Precision = HALF) -> AttentionShape:
    """One layer's attention on one rank; latent attention decodes as all heads against one latent."""
    return AttentionShape(
        num_heads=max(1, attention.num_heads // parallelism),
        num_kv_heads=max(1, attention.num_kv_heads // parallelism),
        head_size=(attention.head_size + attention.value_size) // 2,
        kv_element_bytes=precision.kv,
    )


def attention_grid(rows: AttentionRows) -> AttentionWork:
    """The work of measured rows."""
    return AttentionWork.of_grid(
        prefill_tokens=rows.prefill_tokens, cached_tokens=rows.cached_tokens, num_decodes=rows.num_decodes,
        decode_tokens=rows.decode_tokens, longest_decode=rows.longest_decode,
    )  # fmt: skip


class StepTime:
    """Step times on one kind of GPU."""

    def __init__(self, hardware: Hardware | None = None) -> None:
        """Begin with what is known of the hardware's links between ranks; all else is learned."""
        self.attention = AttentionTime()
        self.operators = OperatorTime(hardware)

    def fit(self, models: Sequence[MeasuredModel]) -> None:
        """Learn from profiles of one GPU.

        Raises:
            ValueError: Nothing in them to learn from.
        """
        self.operators.fit([sample for model in models for sample in model.operators])
        self.attention.fit([sample for model in models if (sample := model.attention) is not None])

    def predict(self, shape: ModelShape, batch: Batch, *, parallelism: int = 1) -> Estimate:
        """Seconds of one step, as arrays of one element."""
        tokens, sequences = np.array([float(batch.num_tokens)]), np.array([float(batch.num_sequences)])
        parts = [self.dense(shape, tokens, sequences, parallelism=parallelism)]
        for (attention, _), count in shape.layers.items():
            work = AttentionWork.of_batch(*_seen(batch, attention.window))
            one = self.attention.predict(attention_shape(attention, parallelism), work)
            parts.append(one.map(partial(np.multiply, count)))
        return Estimate.total(parts)

    def dense(
        self, shape: ModelShape, tokens: Array, sequences: Array, *, parallelism: int = 1, collectives: bool = True
    ) -> Estimate:
        """Seconds of everything but attention, for steps of so many tokens and requests.

        Args:
            collectives: Whether what ranks send each other counts; profilers of one rank do not see it.
        """
        parts = [
            self.dense_of(shape, rows, parallelism=parallelism, per_sequence=per_sequence, collectives=collectives)
            for rows, per_sequence in ((tokens, False), (sequences, True))
        ]
        return Estimate.total(parts)

    def dense_of(
        self, shape: ModelShape, rows: Array, *, parallelism: int, per_sequence: bool, collectives: bool = True
    ) -> Estimate:
        """Seconds of the operators whose rows are tokens, or of those whose rows are requests."""
        return Estimate.total(
            [
                self.operators.predict(one, rows).map(partial(np.multiply, one.calls))
                for one in dense_operators(shape, parallelism=parallelism)
                if one.per_sequence is per_sequence and (collectives or one.family != COLLECTIVE)
            ]
        )


def _seen(batch: Batch, window: int | None) -> tuple[Sequence[tuple[int, int]], Sequence[int]]:
    """The batch as a layer with this window sees it."""
    if window is None:
        return batch.prefills, batch.decodes
    prefills = [(new, min(cached, window - 1)) for new, cached in batch.prefills]
    return prefills, [min(context, window) for context in batch.decodes]
