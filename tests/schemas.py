"""Whether the files of a run are as their schemas say, which come with the package."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

RESULTS = "run/results.schema.json"
PREDICTIONS = {
    "token": "tasks/lama/one_token.schema.json",
    "candidates": "tasks/lama/whole_answers.schema.json",
    None: "tasks/superglue/predictions.schema.json",
}
"""By `data.answers` of the results."""


def validator(name: str) -> Draft202012Validator:
    schema = json.loads(files("megaprompt").joinpath(name).read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def no_number(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def check_run(run: Path) -> dict[str, Any]:
    """Results and all predictions; returns the former."""
    results = json.loads((run / "results.json").read_text(), parse_constant=no_number)
    validator(RESULTS).validate(results)
    assert {"commands", "seeds"} <= set(results)
    assert "files" in results["data"]
    assert all("sha256" in asked for asked in results["data"]["relations"].values())
    line_is_valid = validator(PREDICTIONS[results["data"]["answers"]]).validate
    predicted = set()
    for path in (run / "predictions").glob("*.jsonl"):
        for text in path.read_text().split("\n")[:-1]:
            line = json.loads(text, parse_constant=no_number)
            line_is_valid(line)
            predicted.add(line["method"])
    assert predicted <= set(results["methods"])
    return results
