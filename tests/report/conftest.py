"""Runs that are written down."""

import json
from pathlib import Path

import pytest

from megaprompt.config import ProbeConfig, to_yaml
from tests.report.made_up import make_results, write_predictions


@pytest.fixture
def results() -> dict:
    return make_results(
        {
            "p-tuning": {"P36": 0.5, "P30": 0.6254},
            "manual": {"P36": 0.538, "P30": 0.5},
            "majority": {"P36": 0.0, "P30": 0.25},
        },
        P36="capital",
    )


@pytest.fixture
def make_run(tmp_path):
    """Write a run: `make_run("a", {"manual": {"P36": 0.5}}, seed=1)`; further options go into its config.yaml."""

    def make(name: str, scores: dict, backbone: str = "tiny", vocabulary: str = "all tokens", **options) -> Path:
        results = make_results(scores)
        results["backbone"] |= {"name": backbone, "hidden_size": options.pop("hidden_size", 576)}
        results["data"]["vocabulary"]["name"] = vocabulary
        path = tmp_path / name
        path.mkdir()
        (path / "results.json").write_text(json.dumps(results))
        (path / "config.yaml").write_text(to_yaml(ProbeConfig(backbone=backbone, out=path, **options)))
        return path

    return make


@pytest.fixture
def answered(make_run) -> Path:
    """P36: 2 facts known to both, 3 to p-tuning alone, 1 to manual alone, 2 to neither; P30: one to p-tuning alone."""
    run = make_run("a", {"manual": {"P36": 0.375, "P30": 0.0}, "p-tuning": {"P36": 0.625, "P30": 1.0}})
    ranks = {"manual": [1, 1, 2, 2, 2, 1, 2, 2], "p-tuning": [1, 1, 1, 1, 1, 2, 9, 9]}
    write_predictions(run, "P36", ranks)
    write_predictions(run, "P30", {"manual": [3], "p-tuning": [1]})
    return run
