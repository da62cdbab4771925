"""Enrolment: a device joins once in its life, with a one-time token."""

from __future__ import annotations

from edge_runtime.agent.client import enrol
from edge_runtime.agent.config import DeviceConfig
from edge_runtime.agent.store import Identity, Store
from edge_runtime.agent.transport import Transport
from edge_runtime.errors import SignatureError
from edge_runtime.log import note
from edge_runtime.protocol.messages import EnrolRequest


def ensure_identity(config: DeviceConfig, store: Store, transport: Transport) -> Identity:
    """The device's identity. A device that has none enrols, after its new key has reached the disk.

    Raises:
        ConfigError: there is no identity and no token.
        SignatureError: the coordinator's key is not the one that the configuration pins.
        CoordinatorError: the coordinator cannot be reached, or refuses the token.
    """
    identity = store.identity()
    if identity is None:
        identity = _enrol(config, store, transport)
    pin = config.coordinator_public_key
    if pin is not None and pin != identity.coordinator_public_key:
        raise SignatureError(
            f"the coordinator's key is {identity.coordinator_public_key} and the configuration pins {pin}; "
            "correct coordinator_public_key, or enrol with the right coordinator in a fresh state_folder"
        )
    return identity


def _enrol(config: DeviceConfig, store: Store, transport: Transport) -> Identity:
    request = EnrolRequest(
        token=config.read_enrolment_token(),
        device_name=config.device_name,
        device_class=config.device_class,
        public_key=store.key().public_key,
    )
    answer = enrol(transport, request)
    identity = Identity(answer.device_id, answer.coordinator_public_key)
    store.save_identity(identity)
    note("enrolled", device_id=identity.device_id, coordinator_key=identity.coordinator_public_key)
    return identity
