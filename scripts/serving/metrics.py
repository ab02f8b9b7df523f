"""Counters of the server in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections import Counter
from collections.abc import Callable, Sequence

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """How many values are at most each bound."""

    def __init__(self, bounds: Sequence[float] = _SECONDS) -> None:
        """`bounds` are in increasing order."""
        self.bounds, self.counts = tuple(bounds), [0] * len(bounds)
        self.count, self.sum = 0, 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.count += 1
        self.sum += value
        for i, bound in enumerate(self.bounds):
            self.counts[i] += value <= bound

    def lines(self, name: str) -> list[str]:
        """The samples."""
        buckets = [
            f'{name}_bucket{{le="{bound:g}"}} {count}'
            for bound, count in zip(self.bounds, self.counts, strict=True)
        ]
        total = [f'{name}_bucket{{le="+Inf"}} {self.count}', f"{name}_sum {self.sum:.6f}"]
        return [*buckets, *total, f"{name}_count {self.count}"]


class Metrics:
    """All counters. Each is changed by one thread only: the event loop's or the scheduler's."""

    def __init__(self) -> None:
        """All counts are 0."""
        self.responses: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.replies: Counter[str] = Counter()  # by finish reason, or why it was cut
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.first_token_seconds = Histogram()
        self.reply_seconds = Histogram()
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}  # name -> (help, value now)

    def text(self) -> str:
        """The page that Prometheus reads."""
        lines: list[str] = []

        def family(name: str, kind: str, text: str, samples: list[str]) -> None:
            full = f"fastlora_{name}"
            lines.extend((f"# HELP {full} {text}", f"# TYPE {full} {kind}"))
            lines.extend(f"fastlora_{sample}" for sample in samples)

        routes = [
            f'http_responses_total{{route="{route}",status="{status}"}} {n}'
            for (route, status), n in sorted(self.responses.items())
        ]
        family("http_responses_total", "counter", "Responses by route and status.", routes)
        ends = [f'replies_total{{end="{end}"}} {n}' for end, n in sorted(self.replies.items())]
        family("replies_total", "counter", "Replies by finish reason.", ends)
        for name, text in (
            ("prompt_tokens", "Prompt tokens of admitted replies."),
            ("new_tokens", "Generated tokens."),
        ):
            sample = f"{name}_total {getattr(self, name)}"
            family(f"{name}_total", "counter", text, [sample])
        for name, text in (
            ("first_token_seconds", "From the request to its first token."),
            ("reply_seconds", "From the request to its last token."),
        ):
            family(name, "histogram", text, getattr(self, name).lines(name))
        for name, (text, value) in self.gauges.items():
            family(name, "gauge", text, [f"{name} {value():g}"])
        return "\n".join(lines) + "\n"
