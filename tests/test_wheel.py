"""What a wheel installs is complete, away from the repository: the command, configurations, page templates."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from megaprompt.config import ProbeConfig
from megaprompt.run.job import probe

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`installed("report", run)` calls the command of a fresh environment with the wheel in it, beside the packages of
    this one, from a directory of its own; returns what it prints."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"  # where setuptools leaves its files
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("megaprompt", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source], check=True, cwd=place
    )
    [wheel] = place.glob("megaprompt-*.whl")
    venv.create(place / "venv", symlinks=True)
    python = place / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    shutil.rmtree(source)
    [packages] = (place / "venv").glob("lib/python*/site-packages")
    # Only its packages: files with .pth in it, such as that of a development install, are not read from there.
    (packages / "tested.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*args: object) -> str:
        command = [python.with_name("megaprompt"), *map(str, args)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    installed_files, own_files = (
        {path.relative_to(top) for path in (top / "megaprompt").rglob("*") if path.is_file()}
        for top in (packages, ROOT)
    )
    missing = {path for path in own_files - installed_files if "__pycache__" not in path.parts}
    assert not missing, "setup.py names what is no Python"
    where = "import megaprompt; print(megaprompt.__file__)"
    found = subprocess.run([python, "-P", "-c", where], cwd=place, env={}, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(packages)
    return run


def test_help(installed):
    assert "Usage: megaprompt COMMAND" in installed("--help")


def test_a_configuration_by_its_name(installed):
    found = json.loads(installed("plan", "gpt2", "--deepspeed", "zero3", "--json"))
    assert [plan["configuration"] for plan in found["plans"]] == ["zero3"]


def test_pages(installed, backbone_directory, data_directory, tmp_path):
    for name in ("a", "b"):
        options = {"methods": ("manual",), "seed": ord(name)}
        probe(ProbeConfig(backbone=str(backbone_directory), data=str(data_directory), out=tmp_path / name, **options))
        (tmp_path / name / "report.html").unlink()
    assert installed("report", tmp_path / "a").strip() == str(tmp_path / "a" / "report.html")
    assert "P36" in (tmp_path / "a" / "report.html").read_text()
    installed("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert (tmp_path / "both" / "report.html").exists()
