"""An OpenAPI document as a page."""

from __future__ import annotations

from edge_runtime.html.openapi_page import openapi_page


def test_texts_are_no_markup() -> None:
    """What a document says is shown as text, whatever is in it."""
    evil = "<b>&</b>"
    document = {
        "info": {"title": evil, "version": "1"},
        "paths": {"/a": {"get": {"description": evil, "responses": {"200": {}}}}},
        "components": {"schemas": {"A": {"enum": [evil]}, "B": {"properties": {evil: {"type": "string"}}}}},
    }
    assert evil not in openapi_page(document, "/openapi.json")
    assert openapi_page(document, "/openapi.json").count("&lt;b&gt;&amp;&lt;/b&gt;") == 5
