"""Limits: what a server accepts from its clients."""

from __future__ import annotations

from dataclasses import dataclass, fields

MAX_PROMPT = 1000  # characters, the limit of OpenAI's API for dall-e-2
MAX_FIELDS = 32  # of a form


@dataclass(frozen=True)
class Limits:
    """What a server accepts; a request beyond it is refused with a 4xx status and a sentence.

    Args:
        max_batch: pictures that the model draws at a time, candidates included.
        max_wait: seconds that a picture waits for others to share its batch.
        max_queue: pictures that may wait; a request for more gets status 429.
        timeout: seconds from a complete request to its pictures; then status 504.
        max_images: the largest n.
        max_steps: the largest number of steps that a request may ask for.
        max_body: bytes of a request body.
        body_timeout: seconds in which the body has to arrive; then status 408.
        max_pixels: width times height of an uploaded image.
        url_seconds: how long a picture can be fetched by its URL.
        url_bytes: memory of all pictures that can; the oldest go first.

    Raises:
        ValueError: a value that is not above 0 (max_wait: below 0), or max_queue below max_images.

    Example:
        >>> Limits(max_queue=2)
        Traceback (most recent call last):
        ValueError: max_queue: expected at least max_images = 10, got 2
    """

    max_batch: int = 8
    max_wait: float = 0.01
    max_queue: int = 64
    timeout: float = 300.0
    max_images: int = 10
    max_steps: int = 100
    max_body: int = 20 * 2**20
    body_timeout: float = 30.0
    max_pixels: int = 2048 * 2048
    url_seconds: float = 3600.0
    url_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 or field.name == "max_wait" and value == 0):
                raise ValueError(f"{field.name}: expected more than 0, got {value}")
        if self.max_queue < self.max_images:
            raise ValueError(
                f"max_queue: expected at least max_images = {self.max_images}, got {self.max_queue}"
            )
