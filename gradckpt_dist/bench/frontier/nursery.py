"""A process that imports a module once and forks a child for each request, in which ``main`` of that module runs.

Imports take seconds, and the bench has two hundred processes. Nothing but imports happens before the fork, so that
children share no compiler cache and no thread. Run as a file, ``nursery.py DESCRIPTOR MODULE``: then it needs the
standard library alone. The descriptor is a socket: for each message, with a child's input, output and errors, the
child's process id comes back. A child that has ended stays a zombie, so that nobody else gets its number.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_STANDARD_DESCRIPTORS = 3


def serve(descriptor: int, module: str) -> None:
    """Fork until the other end is closed."""
    die_with_parent(os.getppid())
    main = importlib.import_module(module).main
    with socket.socket(fileno=descriptor) as control:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 1, _STANDARD_DESCRIPTORS)
            if not message:
                return
            nursery = os.getpid()
            child = os.fork()
            if child == 0:
                control.close()
                _become(nursery, descriptors, main)
            for one in descriptors:
                os.close(one)
            control.sendall(f"{child}\n".encode())


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone, which it may be already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _become(nursery: int, descriptors: list[int], main: Callable[[], None]) -> None:
    """Run ``main`` as a process with a session and standard descriptors of its own; does not return."""
    code = 1
    try:
        os.setsid()
        die_with_parent(nursery)
        for standard, one in enumerate(descriptors):
            os.dup2(one, standard)
            os.close(one)
        main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
