"""What is said of mistakes on the command line: one line that names the remedy."""

from __future__ import annotations

from cyclopts import CycloptsError, MissingArgumentError, UnknownOptionError
from cyclopts.exceptions import UnusedCliTokensError


def said_of(error: CycloptsError) -> str:
    """A mistake on one line. Of something required, the first sentence of its help says what to give."""
    text = " ".join(str(error).split())
    help_of_command = f"`megaprompt {' '.join(error.command_chain or ())} --help` tells what may be given"
    match error:
        case MissingArgumentError(argument=argument, app=command) if argument is not None and command is not None:
            if not argument.required:
                return f"{argument.name} requires an argument; {help_of_command}"
            about = command.assemble_argument_collection(parse_docstring=True)[argument.name].parameter.help or ""
            sentence = " ".join(about.split()).partition(". ")[0].removesuffix(".")
            by_place = argument.field_info.is_positional
            name = argument.name.lstrip("-").upper() if by_place else argument.name
            return f"{name} is missing: give {sentence[:1].lower()}{sentence[1:]}"
        case UnusedCliTokensError():
            return f"{' '.join(error.unused_tokens or ())}: not expected; {help_of_command}"
        case UnknownOptionError() if not text.endswith("?"):  # if nothing with a similar name was suggested
            return f"{text.removesuffix('.')}; {help_of_command}"
    return text
