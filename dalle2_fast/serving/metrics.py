"""Metrics of a server in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.exposition import generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters and histograms of one server, in a registry of their own.

    Args:
        waiting: the number of pictures that wait.
        running: the number of pictures that are being drawn.
        stored_bytes: the size of the pictures that have a URL.
    """

    def __init__(
        self,
        waiting: Callable[[], float],
        running: Callable[[], float],
        stored_bytes: Callable[[], float],
    ) -> None:
        self.registry = CollectorRegistry()

        def named(kind, name: str, text: str, labels: tuple[str, ...] = (), **options):
            return kind(f"dalle2_{name}", text, labels, registry=self.registry, **options)

        self.requests = named(Counter, "requests", "Requests answered", ("route", "status"))
        self.request_seconds = named(
            Histogram, "request_seconds", "Seconds of a request, body included", ("route",), buckets=SECONDS
        )
        self.images = named(Counter, "images", "Pictures sent", ("route",))
        self.batch_size = named(
            Histogram, "batch_size", "Pictures of a batch", buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.stage_seconds = named(
            Histogram, "stage_seconds", "Seconds of a stage of a batch", ("stage",), buckets=SECONDS
        )
        named(Gauge, "queue_length", "Pictures that wait").set_function(waiting)
        named(Gauge, "running", "Pictures that are being drawn").set_function(running)
        named(Gauge, "stored_bytes", "Bytes of the pictures that have a URL").set_function(stored_bytes)
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All values, as CONTENT_TYPE."""
        return generate_latest(self.registry)


__all__ = ["CONTENT_TYPE", "Metrics"]
