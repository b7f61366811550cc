"""Exchanges what an ingress has seen of output lengths for what others saw, beside requests (shell around the cost actor).

Rule: the actor may be away at any time. The ingress then goes on with what it has, and learns from its own requests.
"""

import asyncio
import logging
import uuid
from typing import Any

import msgspec

from cluster.length_predictor import LengthPredictor
from cost_service.length_messages import LengthNews
from cost_service.metrics import OUTPUT_LENGTH_COVERAGE, OUTPUT_LENGTH_LOSS_RATIO
from cost_service.named_actor import exchange_for_ever
from cost_service.output_length import OutputLength
from cost_service.serve_metrics import LiveGauge, degraded_gauge
from cost_service.service import ACTOR

logger = logging.getLogger("ray.serve")

INTERVAL_S = 1.0
LEARNED_AT_ONCE = 16
"""Requests of others that are learned before this ingress's own requests get their turn: about a millisecond."""

_news = msgspec.json.Decoder(LengthNews)


class LengthExchange:
    """One ingress's end of the cost service."""

    def __init__(self, max_model_len: int) -> None:
        self.predictor = LengthPredictor(source=uuid.uuid4().hex, max_model_len=max_model_len)
        self._degraded = degraded_gauge("output_lengths")
        self._coverage = LiveGauge(OUTPUT_LENGTH_COVERAGE)
        self._loss_ratio = LiveGauge(OUTPUT_LENGTH_LOSS_RATIO)

    async def run(self) -> None:
        """Exchange for ever."""
        await exchange_for_ever(
            ACTOR, self._exchange, self._say_degraded, interval_s=lambda: INTERVAL_S,
            kept="output lengths stay as they are",
        )  # fmt: skip

    async def _exchange(self, actor: Any) -> None:
        self._tell_quality()
        news = _news.decode(await actor.exchange_lengths.remote(msgspec.json.encode(self.predictor.report())))
        model = None if news.model is None else await asyncio.to_thread(_read_model, news.model)
        self.predictor.hear(news, model)
        for number, request in enumerate(news.finished, start=1):
            self.predictor.learn_other(request)
            if number % LEARNED_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _tell_quality(self) -> None:
        quality = self.predictor.quality
        if quality.num_requests:
            self._coverage.set(quality.coverage)
        if quality.loss_ratio is not None:
            self._loss_ratio.set(quality.loss_ratio)

    def _say_degraded(self, away: bool) -> None:
        self._degraded.set(float(away), tags={"part": "output_lengths"})


def _read_model(document: dict[str, Any]) -> OutputLength | None:
    try:
        return OutputLength.from_document(document)
    except ValueError as error:
        logger.warning("What the cost service knows of output lengths is left out, and learned anew: %s", error)
        return None
