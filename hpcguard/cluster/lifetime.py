"""Worker processes that end when the process which started them is gone, however it ended."""

import os
import threading
import time


def end_with_parent(parent: int, interval: float = 0.5) -> None:
    """Watch in a thread whether process `parent` is still our parent; once it is not, exit at once."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
