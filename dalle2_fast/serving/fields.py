"""The fields of a request, as JSON or as a form: names, types and ranges of OpenAI's API, and ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle2_fast.serving.errors import ApiError, did_you_mean
from dalle2_fast.serving.limits import MAX_PROMPT

MODEL = "dalle2-fast"
MODELS = (MODEL, "dall-e-2")  # the second so that existing programs need no change
FILES = ("image", "mask")  # fields of a form that are not text

Caption = Annotated[str, Field(max_length=MAX_PROMPT)]


class Fields(BaseModel):
    """What the three requests have in common; a field that is null or missing has its default."""

    model_config = ConfigDict(extra="forbid")
    files: ClassVar[tuple[str, ...]] = ()

    model: Annotated[str, Field(description="dalle2-fast, or dall-e-2")] = MODEL
    n: Annotated[int, Field(ge=1, description="pictures")] = 1
    size: Annotated[str, Field(description='"auto", the largest, or for example "256x256"')] = "auto"
    response_format: Literal["url", "b64_json"] = "url"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    user: Annotated[str, Field(max_length=256, description="accepted, and not used")] = ""
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="of the first picture")] = None
    steps: Annotated[int | None, Field(ge=1, description="diffusion steps of the decoder")] = None
    guidance: Annotated[
        float | None, Field(ge=0, allow_inf_nan=False, description="guidance scale of the decoder")
    ] = None


class Generations(Fields):
    """POST /v1/images/generations."""

    prompt: Caption
    negative_prompt: Annotated[Caption | None, Field(description="what guidance leads away from")] = None


class Edits(Generations):
    """POST /v1/images/edits."""

    files: ClassVar[tuple[str, ...]] = ("image", "mask")


class Variations(Fields):
    """POST /v1/images/variations."""

    files: ClassVar[tuple[str, ...]] = ("image",)


Kind = TypeVar("Kind", bound=Fields)


def read_json(kind: type[Kind], body: bytes) -> Kind:
    """The fields in a JSON body. ApiError 400 for anything else.

    Example:
        >>> read_json(Generations, b'{"prompt": "a red ring", "n": 2}').n
        2
    """
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        values = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ApiError(400, f"body: expected a JSON object, got malformed JSON ({reason})") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"body: expected a JSON object, got {_shown(values)}")
    return _checked(kind, values, strict=True)


def read_form(kind: type[Kind], values: Mapping[str, str]) -> Kind:
    """The fields of a form, whose values are all text. ApiError 400 as `read_json`."""
    return _checked(kind, values, strict=False)


def _checked(kind: type[Kind], values: Mapping[str, Any], *, strict: bool) -> Kind:
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:  # first, because an unknown name explains a missing one
        if name not in kind.model_fields:
            hint = did_you_mean(name, [*kind.model_fields, *kind.files])
            raise ApiError(400, f"{_shown(name)}: unknown field{hint}", param=name[:64])
    try:
        fields = kind.model_validate(given, strict=strict)
    except ValidationError as error:
        raise _refused(error.errors()[0]) from None
    if fields.model not in MODELS:
        message = f"model: there is no model {_shown(fields.model)}{did_you_mean(fields.model, MODELS)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return fields


def _refused(detail: Any) -> ApiError:
    """An error of pydantic as one sentence that begins with the field."""
    name = str(detail["loc"][0])
    if detail["type"] == "missing":
        return ApiError(400, f"{name}: expected a value, got none", param=name)
    if detail["type"] == "string_too_long":
        limit, length = detail["ctx"]["max_length"], len(detail["input"])
        return ApiError(400, f"{name}: expected at most {limit} characters, got {length}", param=name)
    expected = re.sub(r"^Input should be ", "expected ", detail["msg"])
    return ApiError(400, f"{name}: {expected}, got {_shown(detail['input'])}", param=name)


def _shown(value: object) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
