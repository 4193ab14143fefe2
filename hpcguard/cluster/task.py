"""What an array task starts with: `python -m hpcguard.cluster.task FOLDER`.

Slurm may warn a task before it has imported anything. So its signal is blocked first: then it waits until somebody asks
for it, here and in every process and thread that we start. A handler would cut a unit in half, and threads that
libraries start on import, without the block, would take the signal and have it handled all the same.
"""

import signal
import sys
from pathlib import Path

TOLD = signal.SIGUSR2  # what Slurm sends before it ends a task


def main() -> int:
    """Run one array task; its exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {TOLD})
    from hpcguard.cluster.submit import run_task
    from hpcguard.errors import InputError

    try:
        run_task(Path(sys.argv[1]))
    except InputError as error:
        print(f"hpcguard: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
