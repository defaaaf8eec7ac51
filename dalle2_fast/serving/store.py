"""PictureStore: the latest pictures, each under a name that nobody can guess, for a while."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from typing import NamedTuple


class StoredPicture(NamedTuple):
    """A picture in the store."""

    data: bytes
    media_type: str
    expires: float  # of time.monotonic


class PictureStore:
    """Pictures in memory. Nothing of a name reaches a file system.

    Args:
        max_bytes: of all pictures; the oldest ones go when there are more.
        seconds: how long a picture stays.

    Example:
        >>> store = PictureStore(max_bytes=100, seconds=60)
        >>> name = store.put(b"picture", "image/png")
        >>> len(name), store.get(name).data, store.get("../" + name)
        (47, b'picture', None)
    """

    def __init__(self, max_bytes: int, seconds: float) -> None:
        self.max_bytes, self.seconds, self.bytes = max_bytes, seconds, 0
        self._pictures: OrderedDict[str, StoredPicture] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._pictures)

    def put(self, data: bytes, media_type: str) -> str:
        """Keep a picture; its name, of 256 random bits."""
        name = f"{secrets.token_urlsafe(32)}.{media_type.removeprefix('image/')}"
        self._pictures[name] = StoredPicture(data, media_type, time.monotonic() + self.seconds)
        self.bytes += len(data)
        while self.bytes > self.max_bytes and len(self._pictures) > 1:
            self._drop_oldest()
        self._drop_expired()
        return name

    def get(self, name: str) -> StoredPicture | None:
        """The picture of that name; None if there is none, or no longer."""
        self._drop_expired()
        return self._pictures.get(name)

    def _drop_expired(self) -> None:
        now = time.monotonic()
        while self._pictures and next(iter(self._pictures.values())).expires <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, dropped = self._pictures.popitem(last=False)
        self.bytes -= len(dropped.data)
