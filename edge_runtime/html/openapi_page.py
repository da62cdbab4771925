"""An OpenAPI document as one page of plain HTML. It loads nothing from anywhere, so it reads the same offline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from edge_runtime.html.style import STYLE

#: Fields of the OpenAPI document that bound a value, with the sign that says so on the page.
BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "minLength": "length ≥",
    "maxLength": "length ≤",
    "minItems": "items ≥",
    "maxItems": "items ≤",
}


def openapi_page(document: dict[str, Any], path: str) -> str:
    """The page for an OpenAPI document: requests first, then the messages that they carry.

    Args:
        document: the document.
        path: path at which the server gives the document itself.
    """
    title = f"{document['info']['title']} {document['info']['version']}"
    schemas = document.get("components", {}).get("schemas", {})
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><main>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">The same for programs: <a href="{escape(path)}">{escape(path)}</a>.</p>',
        "<section><h2>Requests</h2>",
        _table(("request", "what it does", "body", "answers"), _requests(document)),
        "</section>",
    ]
    for name, schema in sorted(schemas.items()):
        parts += [f'<section id="{escape(name)}"><h2>{escape(name)}</h2>', *_schema(schema), "</section>"]
    return "\n".join([*parts, "</main></body></html>\n"])


def _requests(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for path, methods in sorted(document["paths"].items()):
        for method, operation in sorted(methods.items()):
            answers = [
                f"{escape(status)} {_content(answer)}".strip()
                for status, answer in sorted(operation.get("responses", {}).items())
            ]
            yield (
                f"<code>{method.upper()} {escape(path)}</code>",
                escape(operation.get("description") or operation.get("summary") or ""),
                _content(operation.get("requestBody", {})),
                "<br>".join(answers),
            )


def _content(body: dict[str, Any]) -> str:
    """What a body or an answer holds, by media type."""
    return ", ".join(
        f"{_kind(content.get('schema', {}))} ({escape(media)})"
        for media, content in body.get("content", {}).items()
    )


def _schema(schema: dict[str, Any]) -> Iterator[str]:
    if "properties" not in schema:
        yield f"<p>{_kind(schema)}</p>"
        return
    required = schema.get("required", [])
    rows = [
        (
            f"<code>{escape(name)}</code>",
            _kind(field),
            "required" if name in required else escape(str(field.get("default", ""))),
        )
        for name, field in schema["properties"].items()
    ]
    yield _table(("field", "value", "default"), rows)


def _kind(schema: dict[str, Any]) -> str:
    """What a value may be, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for several in ("oneOf", "anyOf", "allOf"):
        if several in schema:
            return " or ".join(map(_kind, schema[several]))
    if "enum" in schema:
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    kinds = schema.get("type", "any value")
    words = escape(kinds if isinstance(kinds, str) else " or ".join(kinds))
    if "items" in schema:
        words = f"{words} of {_kind(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        words = f"{words} of {_kind(schema['additionalProperties'])}"
    limits = [f"{sign} {schema[name]}" for name, sign in BOUNDS.items() if name in schema]
    return f"{words} {escape(', '.join(limits))}".strip()


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table whose cells are HTML."""
    head = "".join(f"<th>{name}</th>" for name in header)
    cells = ("".join(f'<td class="t">{cell}</td>' for cell in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>\n" for row in cells)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'
