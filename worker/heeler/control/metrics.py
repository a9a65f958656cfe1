"""The status as Prometheus metrics, named `heeler_*`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heeler.status import Phase, Status


class _StatusCollector(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        now = self._status.snapshot()
        events = CounterMetricFamily("heeler_events", "Events by name; faults are among them.", labels=["event"])
        for name, count in now["events"].items():
            events.add_metric([name], count)
        yield events
        outcomes = CounterMetricFamily("heeler_attempts", "Attempts that ended, by outcome.", labels=["outcome"])
        for name, count in now["outcomes"].items():
            outcomes.add_metric([name], count)
        yield outcomes
        phases = GaugeMetricFamily("heeler_phase", "1 for the phase that the worker is in.", labels=["phase"])
        for phase in Phase:
            phases.add_metric([phase.value], float(phase.value == now["phase"]))
        yield phases


def render(status: Status) -> bytes:
    """The metrics as text."""
    registry = CollectorRegistry()
    registry.register(_StatusCollector(status))
    return generate_latest(registry)
