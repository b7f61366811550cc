"""One ingress's live knowledge of output lengths: predicts each request's, learns from each that has finished.

Rules:
- Nobody is asked on a request's path; what this ingress sees and what others saw is exchanged beside it
  (`cluster.serve_lengths`, `cost_service.length_service`).
- An ingress does not tokenize. It takes a text's length for its bytes (`cost_service.prompt_text`), both when it predicts
  and when it learns; the model asks only for the order of prompt lengths, so that the ratio matters nowhere but between
  prompts of text and of token ids.
- A request that ended by itself teaches its length, one that was cut at its limit that it is longer. One that was aborted,
  or ignores the end of its text, teaches nothing; nor does one of several sequences, for usage tells only their sum.
- No clock, no Ray. Unreported requests are bounded: the oldest are not told to others.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.answers import Ending
from cluster.request_checks import max_output_tokens
from cost_service.length_messages import MAX_FINISHED, FinishedRequest, LengthNews, LengthReport
from cost_service.length_service import LengthQuality, learn
from cost_service.output_length import QUANTILES, OutputLength, Quantiles, pinball
from cost_service.prompt_text import prompt_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What was predicted of a request, until it has finished."""

    tenant: str
    kind: str
    prompt_tokens: int
    quantiles: Quantiles
    own_quantiles: Quantiles
    """Of the tenant alone: what the prediction is compared with."""

    teaches: bool
    """Whether its end will tell how long such a request is."""

    def output_tokens(self) -> dict[str, int]:
        """What the engine is told of it, as arguments of `replicas.request_stamp.make_stamp`."""
        _, median, upper = self.quantiles
        return {"median_tokens": round(median), "upper_tokens": round(upper)}


class LengthPredictor:
    """Predicts and learns; lives on one thread."""

    def __init__(self, *, source: str, max_model_len: int) -> None:
        """Begin knowing nothing.

        Args:
            source: A name of this ingress that nobody else has or had.
        """
        self._source, self._max_model_len = source, max_model_len
        self._model = OutputLength()
        self.quality = LengthQuality()
        """Of what this ingress predicted."""

        self._unreported: deque[FinishedRequest] = deque(maxlen=MAX_FINISHED)
        self._heard: int | None = None
        self._report: LengthReport | None = None
        self._num_reports = 0

    def expect(self, tenant: str, checked: Mapping[str, Any]) -> Expectation:
        """Predict the output length of a checked request (`cluster.request_checks`), in microseconds."""
        kind = f"{checked['model']}/{'chat' if 'messages' in checked else 'completion'}"
        num_prompts, prompt_tokens = prompt_size(checked)
        most = max_output_tokens(checked, self._max_model_len)
        endless = checked.get("ignore_eos", False)
        least = most if endless else checked.get("min_tokens", 0)
        quantiles = self._model.predict(tenant, prompt_tokens, most, kind=kind)
        own = self._model.own_quantiles(tenant, most, kind=kind)
        return Expectation(
            tenant=tenant,
            kind=kind,
            prompt_tokens=prompt_tokens,
            quantiles=tuple(max(length, least) for length in quantiles),
            own_quantiles=tuple(max(length, least) for length in own),
            teaches=num_prompts * checked.get("n", 1) == 1 and not endless,
        )

    def finish(self, expected: Expectation, ending: Ending) -> None:
        """Learn from a request whose answer has ended."""
        if not expected.teaches or not (ending.by_itself or ending.cut):
            return
        length = ending.output_tokens
        request = FinishedRequest(
            tenant=expected.tenant,
            kind=expected.kind,
            prompt_tokens=expected.prompt_tokens,
            output_tokens=length,
            cut=ending.cut,
            within=round(expected.quantiles[0]) <= max(length, 1) <= round(expected.quantiles[-1]),
            loss=_loss(expected.quantiles, length),
            own_loss=_loss(expected.own_quantiles, length),
        )
        learn(self._model, request)
        self.quality.add(request)
        self._unreported.append(request)

    def report(self) -> LengthReport:
        """What the cost service is to be told; the same until its answer was heard."""
        if self._report is None:
            self._num_reports += 1
            self._report = LengthReport(
                source=self._source, number=self._num_reports, heard=self._heard, finished=tuple(self._unreported)
            )
            self._unreported.clear()
        return self._report

    def hear(self, news: LengthNews, model: OutputLength | None) -> None:
        """Take note of the answer to the last report; the others' requests are for `learn_others`.

        Args:
            model: The news' model, where there is one; what finished after the report is added to it.
        """
        assert self._report is not None, "news without a report"
        self._report, self._heard = None, news.newest
        if model is not None:
            self._model = model
            for request in self._unreported:
                learn(model, request)

    def learn_other(self, request: FinishedRequest) -> None:
        """Learn from a request that another ingress has seen finish."""
        learn(self._model, request)


def _loss(quantiles: Quantiles, length: int) -> float:
    pairs = zip(QUANTILES, quantiles, strict=True)
    return sum(pinball(quantile, predicted, length) for quantile, predicted in pairs) / len(QUANTILES)
