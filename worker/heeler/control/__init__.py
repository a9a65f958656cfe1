"""The control API: loopback only, for people, probes and metrics."""
