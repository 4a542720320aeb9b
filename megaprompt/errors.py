"""The exceptions that megaprompt raises on purpose: one line for the user, saying what is wrong and what to do."""


class MegapromptError(Exception):
    """Something a user can put right. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(MegapromptError):
    """An option or a combination of options that cannot work."""

    exit_code = 2


def first_line(error: Exception) -> str:
    """What an error of another package has to say, on the one line that a message has for it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
