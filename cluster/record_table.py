"""Records of requests in columns: 64 bytes each instead of several hundred, for millions of them."""

import math
from array import array
from collections.abc import Sequence
from typing import overload

from cluster.records import RequestRecord


class RecordTable(Sequence[RequestRecord]):
    """A sequence of records, in the order in which they were added."""

    def __init__(self) -> None:
        self._tenants: dict[str, int] = {}
        self._names: list[str] = []
        self._counts = array("q")
        """Of each record: number, tenant, prompt, output and delivered tokens, swaps, recomputes."""
        self._times = array("d")
        """Of each record: arrival, first token, finish; NaN where there is none."""

    def add(self, record: RequestRecord) -> None:
        """Take a record of a request whose name is a number."""
        tenant = self._tenants.setdefault(record.tenant, len(self._names))
        if tenant == len(self._names):
            self._names.append(record.tenant)
        self._counts.extend(
            (int(record.request_id), tenant, record.prompt_tokens, record.output_tokens, record.delivered_tokens,
             record.swaps, record.recomputes)
        )  # fmt: skip
        times = (record.arrival_s, record.first_token_s, record.finish_s)
        self._times.extend(math.nan if one is None else one for one in times)

    def __len__(self) -> int:
        return len(self._times) // 3

    @overload
    def __getitem__(self, index: int) -> RequestRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[RequestRecord]: ...

    def __getitem__(self, index: int | slice) -> RequestRecord | list[RequestRecord]:
        """Return records as they were added."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} records, and no record {index}.")
        index %= len(self)
        number, tenant, prompt, output, delivered, swaps, recomputes = self._counts[7 * index : 7 * index + 7]
        arrival_s, first_s, finish_s = self._times[3 * index : 3 * index + 3]
        return RequestRecord(
            request_id=str(number), tenant=self._names[tenant], arrival_s=arrival_s,
            first_token_s=None if math.isnan(first_s) else first_s, finish_s=None if math.isnan(finish_s) else finish_s,
            prompt_tokens=prompt, output_tokens=output, delivered_tokens=delivered, swaps=swaps, recomputes=recomputes,
        )  # fmt: skip
