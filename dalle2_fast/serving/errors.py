"""ApiError: an answer that is no picture, in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

MAX_LENGTH = 600  # characters of a message: one may quote what was sent


class ApiError(Exception):
    """An error that a client sees as {"error": {"message", "type", "param", "code"}}.

    Args:
        status: of the HTTP response.
        message: a sentence; long ones are cut.
        param: the field at fault.
        code: a word for programs, such as "rate_limit_exceeded".
        headers: further headers of the response.

    Example:
        >>> ApiError(400, "n: expected at most 10, got 11", param="n").body()["error"]["type"]
        'invalid_request_error'
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        text, param = _encodable(self.message), _encodable(self.param)
        if len(text) > MAX_LENGTH:
            text = f"{text[:MAX_LENGTH]} ..."
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": text, "type": kind, "param": param, "code": self.code}}


def _encodable(text: str | None) -> Any:
    """`text` without lone surrogates, which JSON can spell and UTF-8 cannot encode."""
    return text and text.encode("utf-8", "backslashreplace").decode()


def did_you_mean(word: str, known: Collection[str]) -> str:
    """"; did you mean ...?" with the nearest known word, or all of them if none is near.

    Example:
        >>> did_you_mean("promt", ["prompt", "seed"])
        '; did you mean prompt?'
    """
    near = get_close_matches(word[:40], list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; expected some of {', '.join(known)}"
