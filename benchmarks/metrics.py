"""From what the clients saw to numbers. All times are seconds on one monotonic clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Record:
    """What became of one request. `events` holds when each piece of text arrived."""

    prompt_tokens: int
    output_tokens: int
    """How many were asked for."""
    sent: float = math.nan
    end: float = math.nan
    events: list[float] = field(default_factory=list)
    """Empty for a server that does not stream."""
    tokens: int = 0
    """How many the server says it generated."""
    counted_prompt: int | None = None
    """How many prompt tokens the server says it read."""
    error: str | None = None

    @property
    def problem(self) -> str | None:
        """Why this request counts as failed; None if it was answered in full."""
        if self.error is not None:
            return self.error
        if self.tokens != self.output_tokens:
            return f"{self.tokens} tokens instead of {self.output_tokens}"
        if self.counted_prompt not in (None, self.prompt_tokens):
            return f"{self.counted_prompt} prompt tokens instead of {self.prompt_tokens}"
        return None

    @property
    def first_token(self) -> float:
        """When the first token was there; without a stream, when all were."""
        return self.events[0] if self.events else self.end

    def tokens_within(self, start: float, end: float) -> float:
        """Tokens that arrived in `[start, end]`, spread evenly over the events.

        Without a stream they are spread evenly over the request's duration.
        """
        if self.events:
            inside = sum(start <= event <= end for event in self.events)
            return self.tokens * inside / len(self.events)
        overlap = min(end, self.end) - max(start, self.sent)
        return self.tokens * max(overlap, 0.0) / max(self.end - self.sent, 1e-9)


@dataclass(frozen=True)
class Window:
    """A measured stretch: from the start until the list of requests ran empty."""

    start: float
    end: float
    cpu_seconds: float
    """User and system time that all processes of the server took in it."""
    other_cpu_seconds: float = 0.0
    """What everything else on the machine took, the client aside: disturbance."""

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True)
class Summary:
    """One cell of the table."""

    requests: int
    failed: int
    problems: list[str]
    """The different reasons of failures."""
    tokens: float
    """Output tokens in the window."""
    prompt_tokens: int
    """Prompt tokens of the requests whose first token came in the window."""
    tokens_per_second: float
    tokens_per_cpu_second: float
    ttft_p50: float
    ttft_p95: float
    tpot_p50: float
    """Median over requests of the seconds per token after the first one; without a stream, of all
    the tokens by the whole duration."""
    tpot_p95: float
    seconds: float
    """The window's length."""
    disturbance: float
    """CPU cores that anything but server and client kept busy, on average."""


def summarise(records: Sequence[Record], window: Window) -> Summary:
    """The numbers of one cell. Failed requests are counted, and give no tokens and no times."""
    good = [record for record in records if record.problem is None]
    tokens = sum(record.tokens_within(window.start, window.end) for record in good)
    first = [record.first_token - record.sent for record in good]
    each = [time_per_token(record) for record in good]
    return Summary(
        requests=len(records),
        failed=len(records) - len(good),
        problems=sorted({record.problem for record in records if record.problem is not None}),
        tokens=tokens,
        prompt_tokens=sum(r.prompt_tokens for r in good if r.first_token <= window.end),
        tokens_per_second=_ratio(tokens, window.seconds),
        tokens_per_cpu_second=_ratio(tokens, window.cpu_seconds),
        ttft_p50=percentile(first, 50),
        ttft_p95=percentile(first, 95),
        tpot_p50=percentile(each, 50),
        tpot_p95=percentile(each, 95),
        seconds=window.seconds,
        disturbance=_ratio(window.other_cpu_seconds, window.seconds),
    )


def time_per_token(record: Record) -> float:
    """Seconds per token after the first, or per token without a stream."""
    if not record.events:
        return (record.end - record.sent) / record.tokens
    return (record.events[-1] - record.events[0]) / max(record.tokens - 1, 1)


def gaps(record: Record, start: float = -math.inf, end: float = math.inf) -> list[float]:
    """Seconds between neighbouring events of which the later lies in `[start, end]`."""
    pairs = zip(record.events, record.events[1:], strict=False)
    return [after - before for before, after in pairs if start <= after <= end]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of them do not exceed; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(math.ceil(percent / 100 * len(values)), 1) - 1]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, minimum, maximum; NaN of nothing."""
    known = [value for value in values if not math.isnan(value)]
    return (median(known), min(known), max(known)) if known else (math.nan, math.nan, math.nan)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
