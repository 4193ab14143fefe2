"""Processes that end when the process which started them is gone, however it ended."""

import ctypes
import os
import signal
import threading
import time

OWNER = "HPCGUARD_OWNER"
PR_SET_PDEATHSIG = 1  # Linux's sys/prctl.h
_libc = ctypes.CDLL(None)  # loaded here, for between fork and exec little is safe


def end_with_parent(parent: int, interval: float = 0.5) -> None:
    """Watch in a thread whether process `parent` is still our parent; once it is not, exit at once."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def owned_environment() -> dict[str, str]:
    """The environment of an hpcguard command that is to end with this process."""
    return {**os.environ, OWNER: str(os.getpid())}


def end_with_owner() -> None:
    """Call first in a command that may have been started with `owned_environment`."""
    owner = os.environ.pop(OWNER, "")  # its own children are not the owner's
    if owner.isdecimal():
        end_with_parent(int(owner))


def die_with_parent() -> None:
    """For a foreign program, as subprocess's preexec_fn: the kernel sends it SIGTERM when the process which started it
    is gone."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
