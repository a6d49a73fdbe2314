"""What Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server; the engine and the routes add to them."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def count(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"gsa_{name}", about, labels, registry=registry)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"gsa_{name}", about, registry=registry)

        self.requests = count("requests", "HTTP requests answered", "path", "status")
        self.texts = count("texts", "Texts by how they ended", "end")
        self.prompt_tokens = count("prompt_tokens", "Tokens of prompts that got a row")
        self.reused_tokens = count(
            "prompt_tokens_reused", "Of those, tokens that a kept state had read already"
        )
        self.written_tokens = count("written_tokens", "Tokens written")
        self.steps = count("steps", "Steps of the pool")
        self.rows = gauge("rows", "Rows of the pool")
        self.rows_taken = gauge("rows_taken", "Rows of the pool that hold a text")
        self.texts_open = gauge("texts_open", "Texts accepted and not finished, waiting ones too")
        self.prefix_bytes = gauge("prefix_bytes", "Bytes of states kept for later prompts")
        self.first_token = Histogram(
            "gsa_first_token_seconds",
            "Seconds from a request to the first token of a text",
            registry=registry,
            buckets=SECONDS,
        )

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return generate_latest(self._registry)
