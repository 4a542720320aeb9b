"""`python -m megaprompt`, as torchrun and srun start it, and `megaprompt`."""

import os
import sys

from megaprompt.cli import main

_RANKS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


def run() -> None:
    """Run the command of this process, and end it."""
    code = main()
    if any(os.environ.get(name, "1") != "1" for name in _RANKS):
        # Threads of process groups may outlive what they belong to, which aborts a rank that has done its work, and the
        # others with it. So the process ends without cleaning up; all files are closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
