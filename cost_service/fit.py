"""A cost snapshot from a profile: what the step-time model says of recomputations, as costs that engines evaluate.

Method: the model is asked for steps of decodes with and without a prefill, over a grid of prefills; the differences are
learned as if an engine had measured them (`cost_service.learner`), the analytic snapshot is the prior.
"""

import itertools
from collections.abc import Sequence

from cost_service.analytic import analytic_snapshot
from cost_service.hardware import UNKNOWN, known_hardware
from cost_service.kv_memory import kv_token_bytes
from cost_service.learner import CostLearner
from cost_service.model_shape import ModelShape
from cost_service.operators import Batch
from cost_service.samples import PrefillSample
from cost_service.snapshot import CostSnapshot
from cost_service.step_time import MeasuredModel, StepTime

NEW_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048)
CACHED_TOKENS = (0, 1024, 4096)
DECODES = (16, 64, 128)
DECODE_CONTEXT = 1024
"""The grid of batches: prefills among decodes of that context."""


def snapshot_of(model: MeasuredModel, times: StepTime, *, block_size: int) -> CostSnapshot:
    """Return version 1 of the costs of the profile's model on its GPU."""
    profile = model.profile
    hardware = known_hardware(profile.hardware) or UNKNOWN  # copies are not in these profiles: a datasheet's
    start = analytic_snapshot(
        model.shape, hardware, model=profile.model, parallelism=profile.parallelism, block_size=block_size,
        block_bytes=block_size * kv_token_bytes(model.shape, parallelism=profile.parallelism),
    )  # fmt: skip
    learner = CostLearner(start)
    learner.observe(prefill_samples(model.shape, times, parallelism=profile.parallelism))
    return learner.refit()


def prefill_samples(shape: ModelShape, times: StepTime, *, parallelism: int) -> Sequence[PrefillSample]:
    """What prefills of the grid add to steps of decodes, by the model."""
    alone = {num: _seconds(shape, times, num, (), parallelism) for num in DECODES}
    return [
        PrefillSample(
            num_tokens=new, attention=float((new + cached) ** 2 - cached**2), num_decodes=num,
            seconds=_seconds(shape, times, num, ((new, cached),), parallelism) - alone[num],
        )
        for new, cached, num in itertools.product(NEW_TOKENS, CACHED_TOKENS, DECODES)
    ]  # fmt: skip


def _seconds(
    shape: ModelShape, times: StepTime, decodes: int, prefills: tuple[tuple[int, int], ...], ranks: int
) -> float:
    batch = Batch(prefills=prefills, decodes=(DECODE_CONTEXT,) * decodes)
    return float(times.predict(shape, batch, parallelism=ranks).seconds[0])
