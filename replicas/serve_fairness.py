"""Exchanges what an engine has served for what the cluster has, beside requests and steps (shell around the fairness actor).

Rules:
- The newest report of the engine holds all that was not answered; older ones are dropped, but for one of all accounts that
  was asked for: it goes first.
- The actor may be away at any time. The engine then goes on with its own counters, and the gauge says so.
- An engine that is silent does not read: it is sent `MAX_UNREAD` messages and no more until it is heard of again. What it
  is not told is not counted as told, so that the next answer holds it; meanwhile a word a second says that it is there.
- One call is in flight at a time, at the interval that the actor asks for.
"""

import time
from collections.abc import Callable
from typing import Any

import msgspec

from cost_service.charges import ServiceKind
from cost_service.named_actor import exchange_for_ever
from cost_service.service_messages import (
    ACTOR,
    ENGINE_INTERVAL_S,
    UNTOLD,
    FairnessAnswer,
    FairnessReport,
    ReplicaLimits,
)
from replicas.admission import AdmissionSettings
from replicas.channel import ServerEnd
from replicas.fair_queue import Admission
from replicas.messages import EngineTotals, ServiceReport, SetShares
from replicas.peak_rate import PeakRate

MAX_UNREAD = 4
MAX_INTERVAL_S = 5.0
"""Whatever the actor asks for: a replica that is silent for longer is taken for gone."""

IDLE_INTERVAL_S = 1.0
ASK_AGAIN_S = 1.0
"""Until an engine that was asked for everything is asked again: the question may have been lost."""

_answers = msgspec.msgpack.Decoder(FairnessAnswer)
_encoder = msgspec.msgpack.Encoder()


class FairnessExchange:
    """One replica's end of the fairness scheduler."""

    def __init__(self, channel: ServerEnd, say_degraded: Callable[[bool], None], *, pool: str, replica: str) -> None:
        """Begin with nothing.

        Args:
            say_degraded: Called with whether the fairness scheduler does not answer.
            pool: Replicas that serve the same requests have the same.
        """
        self._channel, self._say_degraded = channel, say_degraded
        self._pool, self._replica = pool, replica
        self._totals: EngineTotals | None = None
        self._newest: ServiceReport | None = None
        self._everything: ServiceReport | None = None
        self._life, self._version = "", UNTOLD
        self._service, self._decode = PeakRate(), PeakRate()
        self._round_trip_s = 0.0
        self._num_unread = 0
        self._exchanged_s = 0.0
        self._asked_s: float | None = None
        self._interval_s = ENGINE_INTERVAL_S

    def note(self, totals: EngineTotals, now_s: float) -> None:
        """Take how the engine stands."""
        self._num_unread = 0
        self._begin(totals.epoch)
        self._totals = totals
        self._service.read(now_s, totals.service)
        self._decode.read(now_s, float(totals.output_tokens))

    def add(self, report: ServiceReport) -> None:
        """Take what the engine has served, to be sent on."""
        self._num_unread = 0
        self._begin(report.epoch)
        self._newest = report
        if report.known is not None:
            self._everything = report

    async def run(self) -> None:
        """Exchange for ever."""
        await exchange_for_ever(
            ACTOR, self._exchange, self._say_degraded, interval_s=lambda: self._interval_s,
            kept="the engine is fair by what it knows itself",
        )  # fmt: skip

    async def _exchange(self, actor: Any) -> None:
        totals, report, began_s = self._totals, self._everything or self._newest, time.monotonic()
        if totals is None:
            return
        if report is None and self._num_unread >= MAX_UNREAD and began_s - self._exchanged_s < IDLE_INTERVAL_S:
            return
        told = self._message(totals, report)
        answer = _answers.decode(await actor.exchange.remote(_encoder.encode(told)))
        self._exchanged_s = now_s = time.monotonic()
        self._round_trip_s = now_s - began_s
        self._interval_s = min(max(answer.interval_s, 0.0), MAX_INTERVAL_S)
        if self._totals is None or self._totals.epoch != told.epoch:
            return  # another life of the engine has begun meanwhile
        if report is not None:
            self._sent(report)
        await self._tell(answer, now_s)

    async def _tell(self, answer: FairnessAnswer, now_s: float) -> None:
        asks = answer.wants_everything and (self._asked_s is None or now_s - self._asked_s > ASK_AGAIN_S)
        message = SetShares(shares=answer.shares, answered=answer.answered, wants_everything=asks)
        is_news = bool(answer.shares) or asks or answer.answered > 0
        if is_news and (self._num_unread >= MAX_UNREAD or not await self._channel.send(message)):
            return
        self._num_unread += is_news
        if asks:
            self._asked_s = now_s
        if not answer.wants_everything:
            self._asked_s = None
            self._life, self._version = answer.life, answer.version

    def _message(self, totals: EngineTotals, report: ServiceReport | None) -> FairnessReport:
        fair_victims = totals.admission == Admission.FAIR  # whatever the policy: see Preemptor.lead
        return FairnessReport(
            pool=self._pool, service=ServiceKind(totals.service_kind), replica=self._replica, epoch=totals.epoch,
            sequence=report.sequence if report is not None else 0,
            accounts=report.accounts if report is not None else [],
            known=report.known if report is not None else None,
            limits=ReplicaLimits(
                num_pool_tokens=totals.num_pool_tokens, max_num_seqs=totals.max_num_seqs, max_tokens=totals.max_model_len,
                max_service_per_s=self._service.per_s, max_decode_tokens_per_s=self._decode.per_s,
            ),
            fair_victims=fair_victims, bypass_service=AdmissionSettings().bypass_service,
            round_trip_s=self._round_trip_s, life=self._life, version=self._version,
        )  # fmt: skip

    def _sent(self, report: ServiceReport) -> None:
        """Forget a report that was answered; a later one may have come meanwhile."""
        if self._everything is report:
            self._everything = None
        if self._newest is report:
            self._newest = None

    def _begin(self, epoch: str) -> None:
        """Forget what another life of the engine said."""
        if self._totals is not None and self._totals.epoch != epoch:
            self._totals = self._newest = self._everything = None
            self._life, self._version, self._asked_s = "", UNTOLD, None
            self._service, self._decode = PeakRate(), PeakRate()
