"""What ingresses and the cost service tell each other about output lengths; JSON on the way.

Rules:
- Numbers and tenants' ids only: nothing of a prompt or an answer.
- A report is repeated, unchanged, until its answer is there: its number keeps it from being learned twice.
"""

from typing import Annotated, Any

import msgspec

from cost_service.output_length import MAX_TOKENS

Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
Loss = Annotated[float, msgspec.Meta(ge=0.0)]

MAX_FINISHED = 4096
"""Requests in one report at most."""


class FinishedRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """A request that has finished, and how well its length was predicted when it came."""

    tenant: str
    kind: str
    """Kinds of a tenant have histories of their own: the model, and chat or completion."""

    prompt_tokens: Tokens
    """What the ingress takes the prompt's length for (`cluster.length_predictor`)."""

    output_tokens: Tokens
    cut: bool
    """At its limit, and not by itself."""

    within: bool
    """Whether it was as long as the lowest and the highest predicted quantile said."""

    loss: Loss
    """Mean pinball loss of the predicted quantiles, in tokens."""

    own_loss: Loss
    """The same of the tenant's own running quantiles."""


class LengthReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An ingress tells what it has seen, and how far it has heard of others."""

    source: str
    """The ingress; another one after a restart."""

    number: Tokens
    """Of this report, rising by one."""

    heard: int | None
    """Number of the newest request that it has heard of; None: it knows nothing yet and asks for the model."""

    finished: Annotated[tuple[FinishedRequest, ...], msgspec.Meta(max_length=MAX_FINISHED)]


class LengthNews(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer: what others have seen."""

    newest: int
    """Number of the newest request that the cost service has learned."""

    finished: tuple[FinishedRequest, ...] = ()
    """Of the other ingresses, the newest ones."""

    model: dict[str, Any] | None = None
    """`OutputLength.to_document`, for an ingress that has none."""
