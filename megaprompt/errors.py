"""The exceptions that megaprompt raises on purpose: one line for the user, saying what is wrong and what to do."""


class MegapromptError(Exception):
    """Something a user can put right. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(MegapromptError):
    """An option or a combination of options that cannot work."""

    exit_code = 2
