"""The control API: loopback only, for people, probes and metrics."""

ADDRESS_FILE = "control"
"""In the state folder: the API's URL while it is served."""
