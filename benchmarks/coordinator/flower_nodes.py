"""Many of Flower's nodes in one process: they speak its Fleet API as its SuperNode does, and train nothing.

    python flower_nodes.py ADDRESS NODES ROUNDS CONNECTIONS

Runs in Flower's own environment. Each node has its key, registers, pulls its message and the objects of it, confirms
it, and pushes a reply with values of its own; over so many connections, each with one request under way. What a
SuperNode does beside that is left out: heartbeats, the app's code, most of the three seconds between two questions.
Writes one line once all nodes are registered, and ends after the rounds.
"""

from __future__ import annotations

import http.client
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import local
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

VERSIONS = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())
#: The longest that the server lets a node be silent.
HEARTBEAT_S = 1800.0
#: Between two questions; a SuperNode waits three seconds.
WAIT_S = 0.5
connections = local()


class SimulatedNode:
    """One node: its key, and its id once it is registered."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._key, public = generate_key_pairs()
        self._public = public_key_to_bytes(public)
        self._encoded = b64encode(self._public).decode()

    def register(self) -> None:
        """Make the node known, and ready for messages."""
        request = fleet_pb2.RegisterNodeFleetRequest(public_key=self._public)
        self._call("register-node", request, fleet_pb2.RegisterNodeFleetResponse)
        activate = fleet_pb2.ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_S)
        answer = self._call("activate-node", activate, fleet_pb2.ActivateNodeResponse)
        self.node = Node(node_id=answer.node_id)

    def play_round(self) -> None:
        """Ask until there is a message, fetch it, and hand in a reply."""
        pull = fleet_pb2.PullMessagesRequest(node=self.node)
        while not (answer := self._call("pull-messages", pull, fleet_pb2.PullMessagesResponse)).messages_list:
            time.sleep(WAIT_S)
        told, tree = message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]
        content = self._fetched(told, tree)
        self._hand_in(Message(self._trained(content), reply_to=told))

    def _fetched(self, told: Message, tree: Any) -> RecordDict:
        run, contents = told.metadata.run_id, {}
        for each in iterate_object_tree(tree):
            if each.object_id not in contents:
                request = message_pb2.PullObjectRequest(node=self.node, run_id=run, object_id=each.object_id)
                while True:
                    answer = self._call("pull-object", request, message_pb2.PullObjectResponse)
                    if answer.object_available:
                        break
                    time.sleep(WAIT_S)
                contents[each.object_id] = answer.object_content
        request = message_pb2.ConfirmMessageReceivedRequest(
            node=self.node, run_id=run, message_object_id=told.metadata.message_id
        )
        self._call("confirm-message-received", request, message_pb2.ConfirmMessageReceivedResponse)
        return inflate_object_from_contents(tree.object_id, contents).content

    def _trained(self, content: RecordDict) -> RecordDict:
        """Other values than any other node's: an object that is there already would not be sent."""
        (values,) = content.array_records["arrays"].to_numpy_ndarrays()
        changed = values + np.random.default_rng(self.node.node_id).standard_normal(values.shape).astype("f4")
        metrics = MetricRecord({"num-examples": 4, "loss": 0.5})
        return RecordDict({"arrays": ArrayRecord([changed]), "metrics": metrics})

    def _hand_in(self, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects, run = get_all_nested_objects(reply), reply.metadata.run_id
        push = fleet_pb2.PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[1.0],
        )
        answer = self._call("push-messages", push, fleet_pb2.PushMessagesResponse)
        for object_id in answer.objects_to_push:
            request = message_pb2.PushObjectRequest(
                node=self.node,
                run_id=run,
                object_id=object_id,
                object_content=objects[object_id].deflate(),
                session_id=answer.session_id,
            )
            if not self._call("push-object", request, message_pb2.PushObjectResponse).stored:
                raise RuntimeError(f"object {object_id} was not stored")

    def _call(self, path: str, request: Any, answer_type: Any) -> Any:
        """The answer to a signed request, over this thread's connection."""
        if not hasattr(connections, "http"):
            connections.http = http.client.HTTPConnection(self._address)
        signed_at = now().isoformat()
        headers = {
            "Content-Type": PROTOBUF_MEDIA_TYPE,
            "Accept": PROTOBUF_MEDIA_TYPE,
            FLEET_HTTP_PUBLIC_KEY_HEADER: self._encoded,
            TIMESTAMP_HEADER: signed_at,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(self._key, signed_at.encode())).decode(),
            **VERSIONS,
        }
        connections.http.request("POST", f"/v1/fleet/{path}", request.SerializeToString(), headers)
        response = connections.http.getresponse()
        body = response.read()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {body[:200]!r}")
        return answer_type.FromString(body)


def main() -> None:
    """Register all nodes, then play the rounds."""
    address, nodes, rounds, threads = sys.argv[1], *map(int, sys.argv[2:5])
    everybody = [SimulatedNode(address) for _ in range(nodes)]
    with ThreadPoolExecutor(threads) as pool:
        _done(pool.map(SimulatedNode.register, everybody))
        print("registered", flush=True)
        for _ in range(rounds):
            _done(pool.map(SimulatedNode.play_round, everybody))


def _done(answers: Iterator[None]) -> None:
    for _ in answers:
        pass


if __name__ == "__main__":
    main()
