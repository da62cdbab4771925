"""Who may read figures."""

from __future__ import annotations

from tests.coordinator.conftest import World
from tests.coordinator.monitoring.scrape import scrape


def test_the_metrics_token_reads_figures_and_nothing_else(world: World) -> None:
    """Without a token nothing is told; with the metrics token no route of the operator answers."""
    assert world.client.get("/metrics").json()["code"] == "not_monitor"
    token = world.app.state.app_state.metrics_token
    assert scrape(world, world.app.state.app_state.admin_token)
    refused = world.client.get("/v1/admin/devices", headers={"Authorization": f"Bearer {token}"})
    assert refused.json()["code"] == "not_admin"
    assert (world.folder / "state/metrics.token").stat().st_mode & 0o777 == 0o600
