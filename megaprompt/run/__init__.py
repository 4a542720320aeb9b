"""One run: the job, its directory, checkpoints, progress, interruption, and what is checked before it."""
