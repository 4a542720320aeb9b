"""The loop: passes of the backbone, who computes what, what is tuned."""
