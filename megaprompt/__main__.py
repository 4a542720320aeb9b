"""`python -m megaprompt`, as torchrun and srun start it."""

import sys

from megaprompt.cli import main

sys.exit(main())
