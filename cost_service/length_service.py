"""The shared knowledge of output lengths: learns from every ingress, tells each what the others saw, and keeps it.

Data flow: reports of finished requests -> one `OutputLength` and a log of the newest requests -> news for each ingress.

Rules:
- An ingress that is new gets the whole model; after that the others' requests, as many as the log and `MAX_NEWS` hold: in
  a busy cluster a sample of them, the newest. Ingresses need not agree to the request: they learn quantiles.
- A report is learned once, however often it comes.
- What is stored is one document; a damaged one is said and left out. One that is read late does not undo what was learned
  meanwhile: the newest requests are learned again on top of it.
- No Ray, no clock, no store: the actor around it (`cost_service.cost_actor`) keeps its document.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Annotated, Any, Literal

import msgspec

from cost_service.length_messages import FinishedRequest, LengthNews, LengthReport
from cost_service.output_length import OutputLength

logger = logging.getLogger(__name__)

COLLECTION, NAME = "output_lengths", "all"
LOG, MAX_NEWS = 4096, 512
"""Requests that are kept for other ingresses, and that one of them is told at once."""

MAX_SOURCES = 1024
"""Ingresses whose last report is remembered."""

SAVE_INTERVAL_S = 10.0
"""What was learned since the last save is lost to a kill; ingresses that live on still have it."""

WINDOW = 1000
"""Requests over which quality is averaged, exponentially."""


class _Stored(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The document in the store."""

    schema: Literal[1]
    newest: Annotated[int, msgspec.Meta(ge=0)]
    numbers: list[tuple[str, int]]
    model: dict[str, Any]


_reports = msgspec.json.Decoder(LengthReport)


@dataclass(slots=True)
class LengthQuality:
    """How well lengths have been predicted lately; nothing while there was no request."""

    num_requests: int = 0
    num_cut: int = 0
    coverage: float = 0.0
    """Share of requests between the lowest and the highest quantile: 0.8 is right where none is cut, more where many are."""

    loss: float = 0.0
    own_loss: float = 0.0
    """Mean pinball losses in tokens, of the prediction and of the tenant's own running quantiles."""

    def add(self, request: FinishedRequest) -> None:
        """Count one more request."""
        self.num_requests += 1
        self.num_cut += request.cut
        share = 1.0 / min(self.num_requests, WINDOW)
        self.coverage += share * (request.within - self.coverage)
        self.loss += share * (request.loss - self.loss)
        self.own_loss += share * (request.own_loss - self.own_loss)

    @property
    def loss_ratio(self) -> float | None:
        """Loss over that of the tenant's own quantiles, below 1 where there is a gain; None where those are never wrong."""
        return self.loss / self.own_loss if self.own_loss > 0.0 else None


class LengthService:
    """One model for the whole cluster. Its document is one of `cost_service.keeper.Kept`."""

    collections = (COLLECTION,)

    def __init__(self) -> None:
        """Begin with nothing."""
        self._model = OutputLength()
        self._newest = self._saved = 0
        """Requests that were learned in all, and when it was saved last."""

        self._numbers: OrderedDict[str, int] = OrderedDict()
        """Each ingress's last report."""

        self._log: deque[tuple[int, str, FinishedRequest]] = deque(maxlen=LOG)
        self.quality = LengthQuality()

    def restore(self, documents: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the stored model, and learn on top of it what is in the log."""
        document = documents[COLLECTION].get(NAME)
        if document is not None:
            try:
                self._restore(document)
            except ValueError as error:
                logger.warning("The stored output lengths are left out, and learned anew: %s", error)

    def unsaved(self) -> Iterator[tuple[str, str, Any]]:
        """The document, if something was learned since it was yielded last."""
        if self._newest != self._saved:
            self._saved = self._newest
            stored = _Stored(
                schema=1, newest=self._newest, numbers=list(self._numbers.items()), model=self._model.to_document()
            )
            yield COLLECTION, NAME, msgspec.to_builtins(stored)

    def forget_saved(self) -> None:
        """Let the document count as unsaved."""
        self._saved = 0

    def exchange(self, report: bytes) -> bytes:
        """Learn from an ingress's report, a `LengthReport`; return `LengthNews` for it.

        Raises:
            ValueError: It is no such report; nothing is learned.
        """
        try:
            told = _reports.decode(report)
        except RecursionError:
            raise ValueError("A report of output lengths is nested too deep.") from None
        if told.number > self._numbers.get(told.source, -1):
            self._numbers[told.source] = told.number
            self._numbers.move_to_end(told.source)
            if len(self._numbers) > MAX_SOURCES:
                self._numbers.popitem(last=False)
            self._learn(told)
        return msgspec.json.encode(self._news(told))

    def status(self) -> dict[str, Any]:
        """Requests that were learned, and how well those since the last start were predicted."""
        quality = self.quality
        told: dict[str, Any] = {"learned": self._newest, "judged": quality.num_requests, "cut": quality.num_cut}
        if quality.num_requests:
            told |= {"coverage": quality.coverage, "loss_tokens": quality.loss, "loss_ratio": quality.loss_ratio}
        return told

    def check(self) -> None:
        """Assert that everything is bounded and the log in order."""
        self._model.check()
        numbers = [number for number, _, _ in self._log]
        assert numbers == list(range(self._newest - len(numbers) + 1, self._newest + 1)), "numbers in the log"
        assert len(self._numbers) <= MAX_SOURCES, f"{len(self._numbers)} ingresses"

    def _learn(self, told: LengthReport) -> None:
        for request in told.finished:
            learn(self._model, request)
            self.quality.add(request)
            self._note(told.source, request)

    def _note(self, source: str, request: FinishedRequest) -> None:
        self._newest += 1
        self._log.append((self._newest, source, request))

    def _news(self, told: LengthReport) -> LengthNews:
        heard = told.heard
        if heard is None:
            return LengthNews(newest=self._newest, model=self._model.to_document())
        if heard > self._newest:  # it remembers more than the store did: all in the log is new
            heard = 0
        unheard = takewhile(lambda entry: entry[0] > heard, reversed(self._log))
        others = islice((request for _, source, request in unheard if source != told.source), MAX_NEWS)
        return LengthNews(newest=self._newest, finished=tuple(others)[::-1])

    def _restore(self, document: Any) -> None:
        stored = msgspec.convert(document, _Stored)
        model = OutputLength.from_document(stored.model)
        self._model = model
        self._saved = stored.newest
        self._numbers = OrderedDict(stored.numbers) | self._numbers
        while len(self._numbers) > MAX_SOURCES:
            self._numbers.popitem(last=False)
        since = [(source, request) for _, source, request in self._log]
        self._log.clear()
        self._newest = stored.newest
        for source, request in since:
            learn(model, request)
            self._note(source, request)


def learn(model: OutputLength, request: FinishedRequest) -> None:
    """Let a model learn from a request that some ingress has seen finish."""
    model.observe(request.tenant, request.prompt_tokens, request.output_tokens, kind=request.kind, cut=request.cut)
