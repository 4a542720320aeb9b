"""The DeepSpeed configurations that come with megaprompt: the folder ds_configs/ of the repository, also in a wheel."""

from __future__ import annotations

from pathlib import Path

AUTO = Path("auto")
"""What `--deepspeed` is given for the configuration that the plan chooses."""

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs")  # of an installed wheel; of the repository


def shipped_configurations() -> list[Path]:
    """The files of all configurations that come with megaprompt."""
    return next((found for folder in _FOLDERS if (found := sorted(folder.glob("*.json")))), [])


def find_configuration(given: Path) -> Path:
    """The file that `--deepspeed` means: a file that is there, or else one that comes with megaprompt.

    >>> find_configuration(Path("zero3")) == find_configuration(Path("ds_configs/zero3.json"))
    True
    """
    if not given.exists() and given.parent in (Path(), Path("ds_configs")):
        for path in shipped_configurations():
            if given.name in (path.name, path.stem):
                return path
    return given
