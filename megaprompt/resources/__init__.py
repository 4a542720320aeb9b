"""Memory and time: predicted from shapes, and measured."""
