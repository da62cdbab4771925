"""What the tests of this folder share with those of the coordinator."""

from __future__ import annotations

from tests.coordinator.conftest import world  # noqa: F401 - a fixture
