"""Memory: what a pass takes (`profile`, `gathering`), what a run needs (`predict`), whether it fits (`plan`), and how
much it really was (`measure`)."""
