"""The page of the API: complete, and readable without any other machine."""

from __future__ import annotations

import re

import pytest

from tests.coordinator.conftest import World


def test_the_page_names_every_request_and_message(world: World) -> None:
    """Each request and each message of the machine-readable description is on the page, with its fields."""
    document = world.client.get("/schema/openapi.json").json()
    text = world.client.get("/schema").text
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in text
    for name, schema in document["components"]["schemas"].items():
        assert f'<section id="{name}">' in text
        for field in schema.get("properties", {}):
            assert f"<code>{field}</code>" in text
    anchors = set(re.findall(r'<section id="([^"]+)">', text))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= anchors


@pytest.mark.parametrize("path", ["/schema", "/schema/", "/schema/swagger", "/schema/nothing"])
def test_the_page_loads_nothing_from_elsewhere(world: World, path: str) -> None:
    """No page below /schema names another host or runs a script, so it is the same on a machine without internet."""
    answer = world.client.get(path)
    assert "://" not in answer.text
    assert "<script" not in answer.text
    assert not re.search(r"""(src|href)=["']//""", answer.text)
    if path in ("/schema", "/schema/"):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
