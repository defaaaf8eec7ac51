"""The body of a request for pictures: JSON, or a form with files."""

from __future__ import annotations

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from dalle2_fast.serving.errors import ApiError, did_you_mean
from dalle2_fast.serving.fields import Fields, Kind, read_form, read_json
from dalle2_fast.serving.limits import MAX_FIELDS

MAX_TEXT = 64 * 2**10  # bytes of a field that is not a file


async def read_request(kind: type[Kind], request: Request) -> tuple[Kind, dict[str, bytes]]:
    """The fields and the files of a request.

    Args:
        kind: those with files are read from a form, the others from JSON.
        request: its body has not been read.

    Raises:
        ApiError: 415 for another content type, 400 for a body that is not as described.
    """
    expected = "multipart/form-data" if kind.files else "application/json"
    came = request.headers.get("content-type", "")
    if came.partition(";")[0].strip().lower() != expected:
        raise ApiError(415, f"Content-Type: expected {expected}, got {came[:60] or 'none'}")
    if not kind.files:
        return read_json(kind, await request.body()), {}
    try:
        # An upload of more than a megabyte is a temporary file without a name until the block ends.
        async with request.form(
            max_files=MAX_FIELDS, max_fields=MAX_FIELDS, max_part_size=MAX_TEXT
        ) as form:
            texts, files = _split(kind, form)
            contents = {name: await file.read() for name, file in files.items()}
    except (ApiError, ClientDisconnect):
        raise
    except HTTPException as error:
        raise ApiError(400, f"body: expected a form, got a malformed one ({error.detail})") from None
    except Exception as error:  # such as an unknown charset; the parser documents none of them
        raise ApiError(400, f"body: expected a form, got one that cannot be read ({error})") from None
    return read_form(kind, texts), contents


def _split(kind: type[Fields], form: FormData) -> tuple[dict[str, str], dict[str, UploadFile]]:
    """The texts and the files of a form. What a file is called is never looked at."""
    texts: dict[str, str] = {}
    files: dict[str, UploadFile] = {}
    for name, value in form.multi_items():
        is_file = isinstance(value, UploadFile)
        if name in texts or name in files:
            raise ApiError(400, f"{name[:60]}: expected once, got several", param=name[:64])
        if name in kind.files and not is_file:
            raise ApiError(400, f"{name}: expected a file, got text", param=name)
        if is_file and name not in kind.files:
            if name in kind.model_fields:
                raise ApiError(400, f"{name}: expected text, got a file", param=name)
            hint = did_you_mean(name, kind.files)
            raise ApiError(400, f"{name[:60]!r}: unknown file{hint}", param=name[:64])
        if isinstance(value, UploadFile):
            files[name] = value
        else:
            texts[name] = value
    return texts, files
