"""Ways to ask: one file each, one interface."""
