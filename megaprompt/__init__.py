"""megaprompt: P-tuning (arXiv 2103.10385) of frozen language models, from a laptop to many nodes."""

from megaprompt.errors import MegapromptError, UsageError

__version__ = "0.1.0"
__all__ = ["MegapromptError", "UsageError", "__version__"]
