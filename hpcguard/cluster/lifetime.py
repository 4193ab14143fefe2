"""Processes that end when the process which started them is gone, however it ended."""

import os
import threading
import time

OWNER = "HPCGUARD_OWNER"


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
    if owner := os.environ.pop(OWNER, None):  # its own children are not the owner's
        end_with_parent(int(owner))
