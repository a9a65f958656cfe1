"""Runs between fork and the user's program, as a process of its own: `python -I -S launcher.py FD PARENT ARGV...`.

It asks the kernel to kill it with its parent, gives signals their default meaning, and becomes the program. A
callback between fork and exec would do the same inside a process with threads, where it can deadlock. Descriptor FD
gets a "!" right before, and closes by itself when the program runs; if it can't be executed, the errno follows.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the program, or write why not and exit with 127."""
    descriptor, parent, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.set_inheritable(descriptor, False)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(127)  # the parent died before we could ask
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.write(descriptor, b"!")
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - no shell is the point
    except OSError as error:
        os.write(descriptor, str(error.errno).encode())
        sys.exit(127)


main()
