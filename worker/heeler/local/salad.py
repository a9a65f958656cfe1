"""A SaladCloud of one project on loopback: a job queue, a container group connected to it, and its machines."""

from __future__ import annotations

import uuid

from heeler.local.imds import ImdsState
from heeler.local.queue_model import ContainerGroup, QueueName
from heeler.local.queue_state import QueueState
from heeler.local.tokens import Identity, TokenIssuer

API_KEY = "local-api-key"
_IDS = uuid.UUID("6b9b8f0e-6f0e-5f0b-9d3e-0f6a3c1b7e55")


def _id(*names: str) -> str:
    """The same id for the same names, always."""
    return str(uuid.uuid5(_IDS, "/".join(names)))


class SaladProject:
    """The queue, who may work on it, and what its machines' environment says."""

    def __init__(
        self,
        state: QueueState,
        tokens: TokenIssuer,
        *,
        queue: QueueName,
        group: str = "workers",
        port: int = 8080,
        path: str = "/",
    ) -> None:
        """Make the queue and connect the group to it.

        Args:
            state: The queues.
            tokens: Who issues the machines' tokens.
            queue: The queue.
            group: The container group's name.
            port: Where the app listens in the group's containers.
            path: What jobs are POSTed to.
        """
        self.state = state
        self.tokens = tokens
        self.queue = queue
        self.group_id = _id(queue.organization, queue.project, group)
        self.group = group
        state.create_queue(queue)
        self.connect(port, path)

    def connect(self, port: int, path: str) -> None:
        """Change where the app listens and what jobs are POSTed to."""
        self.state.connect(ContainerGroup(self.group_id, self.group, self.queue, port, path))

    def imds(self, machine_id: str) -> ImdsState:
        """What the metadata service of one machine of the group knows."""
        organization = self.queue.organization
        identity = Identity(machine_id, _id(organization), organization, self.group_id, self.group)
        return ImdsState(identity, self.tokens)

    def environment(self, imds: ImdsState, *, endpoint: str, metadata_uri: str) -> dict[str, str]:
        """The environment of a container on a machine: what Salad always sets, and where our services are."""
        machine = imds.identity.machine_id
        organization, project, _ = self.queue
        return {
            "SALAD_MACHINE_ID": machine,
            "SALAD_INSTANCE_ID": _id(self.group_id, machine),
            "SALAD_CONTAINER_GROUP_ID": self.group_id,
            "SALAD_CONTAINER_GROUP_NAME": self.group,
            "SALAD_ORGANIZATION_NAME": organization,
            "SALAD_ORGANIZATION_ID": _id(organization),
            "SALAD_PROJECT_NAME": project,
            "SALAD_PROJECT_ID": _id(organization, project),
            "SALAD_SERVICE_ENDPOINT": endpoint,
            "SALAD_SERVICE_USE_TLS": "false",
            "SALAD_METADATA_URI": metadata_uri,
        }
