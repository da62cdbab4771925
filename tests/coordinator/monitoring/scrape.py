"""A scrape, read as Prometheus' own client reads it."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.coordinator.conftest import World


def scrape(world: World, token: str | None = None) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples, by name and labels, as Prometheus' own client reads them."""
    token = token or world.app.state.app_state.metrics_token
    answer = world.client.get("/metrics", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
