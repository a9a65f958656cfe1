"""The entry point. Signals are taken in hand before anything slow is imported."""

from __future__ import annotations

from heeler import signals


def main() -> None:
    """Run the command line and exit with its code."""
    signals.hold()
    from heeler.cli import run_cli  # noqa: PLC0415 - slow, and a signal may come meanwhile

    run_cli()


if __name__ == "__main__":
    main()
