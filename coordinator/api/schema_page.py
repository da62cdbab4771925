"""``/schema``: the API as one page of plain HTML."""

from __future__ import annotations

from typing import Any

from litestar import Request
from litestar.openapi.plugins import OpenAPIRenderPlugin

from edge_runtime.html.openapi_page import openapi_page

DOCUMENT = "/schema/openapi.json"


class SchemaPage(OpenAPIRenderPlugin):
    """Renders the OpenAPI document on the server, without scripts."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The page for a document."""
        del request
        return openapi_page(openapi_schema, DOCUMENT).encode()
