"""A request's bytes as a checked body: JSON, UTF-8, finite numbers, known fields; anything else is a 400.

Knows JSON and pydantic; knows no route. Rejected: FastAPI's own body parameters (they take NaN, and say 422 in a shape
that OpenAI's clients do not read); their place in the OpenAPI document is kept by `documented`.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError

from lofi.serve.faults import Refused
from lofi.serve.openai_types import Body, refuse_extras, sentence_of

Kind = TypeVar("Kind", bound=Body)
DEEPEST = 64  # levels of lists and objects; no request needs ten


async def body_of(request: Request, kind: type[Kind]) -> Kind:
    """The body as `kind`.

    Raises  Refused 400, 413 or 415; RequestError for a field that is not supported or not known
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
        raise Refused(415, f"the body is {media or 'of no stated type'}: send application/json", code="media_type")
    value = parsed(await request.body())
    try:
        found = kind.model_validate(value)
    except ValidationError as error:
        sentence, param = sentence_of(error.errors(include_url=False, include_context=False, include_input=False))
        raise Refused(400, sentence, param=param, code="invalid_field") from None
    refuse_extras(found)
    return found


def parsed(raw: bytes) -> Any:
    """The JSON object in `raw`; Refused 400 for anything else, however it is wrong."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, parse_constant=_no_number)
        _check(value, DEEPEST)
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 at byte {error.start}: send UTF-8", code="not_utf8") from None
    except (ValueError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise Refused(400, f"the body cannot be read as JSON ({told}): send one JSON object", code="json") from None
    if not isinstance(value, dict):
        raise Refused(400, f"the body is a JSON {type(value).__name__}: send one JSON object", code="json")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check(value: Any, levels: int) -> None:
    """ValueError for text with half a surrogate pair, which no encoding can write, and for endless nesting."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("a text holds half a surrogate pair") from None
    elif isinstance(value, (dict, list)):
        if levels == 0:
            raise RecursionError
        for item in (*value, *value.values()) if isinstance(value, dict) else _texts(value):
            _check(item, levels - 1)


def _texts(values: list[Any]) -> list[Any]:
    """What can be wrong in a list; a long list of token ids is passed over quickly."""
    return [item for item in values if isinstance(item, (str, list, dict))]


def documented(kind: type[Body]) -> dict[str, Any]:
    """The part of the OpenAPI document that says a route reads `kind`."""
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def schemas(*kinds: type[Body]) -> dict[str, Any]:
    """The components of the OpenAPI document that `documented` refers to."""
    found: dict[str, Any] = {}
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[kind.__name__] = schema
    return found
