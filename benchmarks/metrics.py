"""Statistics of the clients' records. All times are seconds on one monotonic clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Record:
    """Sizes, times and outcome of one request."""

    prompt_tokens: int
    output_tokens: int
    """Requested number of output tokens."""
    sent: float = math.nan
    end: float = math.nan
    events: list[float] = field(default_factory=list)
    """Time of each event with text; empty for a server that does not stream."""
    tokens: int = 0
    """Output tokens reported by the server."""
    counted_prompt: int | None = None
    """Prompt tokens reported by the server."""
    error: str | None = None

    @property
    def problem(self) -> str | None:
        """Why this request counts as failed; None if the response is complete."""
        if self.error is not None:
            return self.error
        if self.tokens != self.output_tokens:
            return f"{self.tokens} tokens instead of {self.output_tokens}"
        if self.counted_prompt not in (None, self.prompt_tokens):
            return f"{self.counted_prompt} prompt tokens instead of {self.prompt_tokens}"
        return None

    @property
    def first_token(self) -> float:
        """Time of the first token; without streaming, of the whole response."""
        return self.events[0] if self.events else self.end

    def tokens_within(self, start: float, end: float) -> float:
        """Output tokens received in `[start, end]`, with the tokens spread evenly over the events.

        Without streaming they are spread evenly over the request's duration.
        """
        if self.events:
            inside = sum(start <= event <= end for event in self.events)
            return self.tokens * inside / len(self.events)
        overlap = min(end, self.end) - max(start, self.sent)
        return self.tokens * max(overlap, 0.0) / max(self.end - self.sent, 1e-9)


@dataclass(frozen=True)
class Window:
    """The measured period: from the start until no request is left to send."""

    start: float
    end: float
    cpu_seconds: float
    """User and system time of all processes of the server in this period."""
    other_cpu_seconds: float = 0.0
    """CPU time of all other processes on the machine except the client: the disturbance."""

    @property
    def seconds(self) -> float:
        """Length of the period."""
        return self.end - self.start


@dataclass(frozen=True)
class Summary:
    """One cell of the table."""

    requests: int
    failed: int
    problems: list[str]
    """The distinct causes of failures."""
    tokens: float
    """Output tokens in the window."""
    prompt_tokens: int
    """Prompt tokens of the requests whose first token was received in the window."""
    tokens_per_second: float
    tokens_per_cpu_second: float
    ttft_p50: float
    ttft_p95: float
    tpot_p50: float
    """Median over requests of the seconds per token after the first; without streaming, of the
    whole duration divided by all tokens."""
    tpot_p95: float
    seconds: float
    """Length of the window."""
    disturbance: float
    """Mean number of CPU cores used by processes other than the server and the client."""


def summarise(records: Sequence[Record], window: Window) -> Summary:
    """The statistics of one cell. Failed requests are counted but contribute no tokens or times."""
    successes = [record for record in records if record.problem is None]
    tokens = sum(record.tokens_within(window.start, window.end) for record in successes)
    ttft = [record.first_token - record.sent for record in successes]
    per_token = [time_per_token(record) for record in successes]
    return Summary(
        requests=len(records),
        failed=len(records) - len(successes),
        problems=sorted({record.problem for record in records if record.problem is not None}),
        tokens=tokens,
        prompt_tokens=sum(r.prompt_tokens for r in successes if r.first_token <= window.end),
        tokens_per_second=_ratio(tokens, window.seconds),
        tokens_per_cpu_second=_ratio(tokens, window.cpu_seconds),
        ttft_p50=percentile(ttft, 50),
        ttft_p95=percentile(ttft, 95),
        tpot_p50=percentile(per_token, 50),
        tpot_p95=percentile(per_token, 95),
        seconds=window.seconds,
        disturbance=_ratio(window.other_cpu_seconds, window.seconds),
    )


def time_per_token(record: Record) -> float:
    """Seconds per token after the first, or per token without streaming."""
    if not record.events:
        return (record.end - record.sent) / record.tokens
    return (record.events[-1] - record.events[0]) / max(record.tokens - 1, 1)


def gaps(record: Record, start: float = -math.inf, end: float = math.inf) -> list[float]:
    """Seconds between consecutive events, where the later one is in `[start, end]`."""
    pairs = zip(record.events, record.events[1:], strict=False)
    return [after - before for before, after in pairs if start <= after <= end]


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; NaN without values."""
    if not values:
        return math.nan
    return sorted(values)[max(math.ceil(percent / 100 * len(values)), 1) - 1]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, minimum, maximum; NaN without values."""
    numbers = [value for value in values if not math.isnan(value)]
    return (
        (median(numbers), min(numbers), max(numbers)) if numbers else (math.nan, math.nan, math.nan)
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
