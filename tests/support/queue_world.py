"""The local Salad Job Queue's rules with a clock that a test moves: no network, no time that passes."""

from __future__ import annotations

from heeler.local.queue_model import Action, ContainerGroup, Job, Machine, QueueName, Stream
from heeler.local.queue_state import QueueState

QUEUE = QueueName("org", "project", "queue")
GRACE = 30.0


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class QueueWorld:
    """A state with one queue and one group, a clock that a test moves, and what streams were sent."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.state = QueueState(grace=GRACE, monotonic=self.clock, wall=self.clock)
        self.state.create_queue(QUEUE)
        self.state.connect(ContainerGroup("group", "workers", QUEUE, 80, "/"))
        self.wakes: list[Machine] = []

    def submit(self, data: bytes = b"{}") -> Job:
        """Submit a job."""
        return self.state.submit(QUEUE, data)

    def open(self, machine: Machine, current: str = "") -> Stream:
        """Open a machine's stream."""
        return self.state.open(machine, current, lambda: self.wakes.append(machine))

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.now += seconds
        self.state.lapse()

    def held(self, machine: Machine) -> Job | None:
        """The job that a machine has."""
        hold = self.state.holds.get(machine)
        return hold.job if hold else None


def actions(job: Job) -> list[Action]:
    """What has happened to a job, in order."""
    return [event.action for event in job.events]
