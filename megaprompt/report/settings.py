"""Which runs differ only in the seed, and what tells others apart: the options that change what a method gives."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from megaprompt.config import ProbeConfig, SuperGlueConfig
from megaprompt.report.runs import Run, backbone_name

_OF_ALL_TRAINING = ("recipe", "batch_size", "max_epochs", "max_steps", "patience", "learn_by")
_OF_PROMPTS = ("template", "encoder", "init", "learning_rate", "weight_decay", *_OF_ALL_TRAINING)
_OF_WEIGHTS = ("fine_tuning_rate", "search", "grouped", *_OF_ALL_TRAINING[1:])
_SETTINGS = {
    "best-manual": ("wordings",),
    "in-context": (),
    "p-tuning": _OF_PROMPTS,
    "best": (*_OF_PROMPTS, "wordings", "candidates"),
    "autoprompt": ("template", "autoprompt_steps"),
    "fine-tuning": _OF_WEIGHTS,
    "manual+fine-tuning": _OF_WEIGHTS,
    "pet": _OF_WEIGHTS,
    "p-tuning+fine-tuning": ("encoder", "learning_rate", "weight_decay", *_OF_WEIGHTS),
}
"""Options that change what a method gives. The others are the same for all runs of a table, or change no results."""

_DEFAULTS: dict[str, Any] = {
    option.name: option.default for kind in (SuperGlueConfig, ProbeConfig) for option in dataclasses.fields(kind)
}
"""For a config.yaml of a version that did not know an option yet."""

Settings = dict[str, dict[str, Any]]  # backbone, facts, and each method that has settings -> options


def setups_of(runs: Iterable[Run]) -> list[tuple[Settings, list[Run]]]:
    """Runs that differ only in the seed, or in methods, and what they have in common: a pair for each row."""
    setups: list[tuple[Settings, list[Run]]] = []
    runs = list(runs)
    everywhere = set.intersection(*(set(run.results["data"]["relations"]) for run in runs)) if runs else set()
    for run in runs:
        settings = _settings(run) | _examples(run, everywhere)
        for of_row, members in setups:
            # A run that only fine-tunes may stand beside one that learns prompts.
            if all(of_row[part] == settings[part] for part in of_row.keys() & settings.keys()):
                of_row |= settings
                members.append(run)
                break
        else:
            setups.append((settings, [run]))
    return setups


def is_control_of(run: Run, settings: Settings) -> bool:
    """Whether a run does what other runs do, set up alike, on their backbone with random weights."""
    mine, backbone = _settings(run), settings["backbone"]
    name, dtype = run.results["backbone"]["name"], run.results["backbone"]["dtype"]
    alike = (name, dtype) == (backbone["name"], backbone["dtype"])
    return alike and all(mine[part] == settings[part] for part in mine.keys() & settings.keys() if part != "backbone")


def _settings(run: Run) -> Settings:
    """What has to be the same in runs that differ only in the seed."""
    backbone, options = run.results["backbone"], _DEFAULTS | run.options
    options["candidates"] = run.results.get("candidates", options["candidates"])  # those in force: as many as fitted
    settings: Settings = {
        # The precision in force: --dtype is often not given, and a DeepSpeed configuration may say it.
        "backbone": {
            "name": backbone_name(backbone),
            "weights": run.control or backbone["fingerprint"],  # random ones are others with every seed
            "dtype": backbone["dtype"],
        },
        "facts": {
            key: options.get(key)
            for key in ("limit_facts", "limit_examples", "setting", "select_on", "patterns", "bos")
        },
    }
    if options["limit_facts"] or options["limit_examples"] or options["setting"] == "full":
        settings["facts"]["data_seed"] = options["data_seed"]
    for method, keys in _SETTINGS.items():
        if run.results["methods"].get(method):
            settings[method] = {key: options[key] for key in keys} if run.options else {"run": str(run.path)}
            if ("fine-tuning" in method or method == "pet") and run.options:
                # Weights are trained in float32 unless something says otherwise, also where the frozen ones are not.
                said = options["dtype"] or run.results.get("deepspeed", options["deepspeed"] or "none") != "none"
                settings[method]["dtype"] = backbone["dtype"] if said else "float32"
    for text in options["discrete"]:
        name, _, path = text.partition("=")
        settings[f"prompts {name}"] = {name: path}
    return settings


def _examples(run: Run, names: Iterable[str]) -> Settings:
    """A part that tells whether runs asked the same of some relations; empty if they do not say."""
    asked = [run.results["data"]["relations"][name].get("sha256", "") for name in sorted(names)]
    return {"examples": {"examples": hashlib.sha256("".join(asked).encode()).hexdigest()[:8]}} if all(asked) else {}


def label_of(settings: Settings, all_settings: Sequence[Settings]) -> str:
    """The backbone's name, and what tells its row from others of the same name."""
    like = [other for other in all_settings if other["backbone"]["name"] == settings["backbone"]["name"]]
    told: dict[str, None] = {}
    for part, options in settings.items():
        others = [other[part] for other in like if part in other]
        for key, value in options.items():
            several = len({str(other[key]) for other in others if key in other}) > 1
            if key == "examples" and any(each.startswith("data-seed") for each in told):
                continue  # which is why they differ
            if several or (key == "run" and len(like) > 1):  # nothing else is known of a run without configuration
                told[f"{key.replace('_', '-')} {'not given' if value is None else value}"] = None
    name = settings["backbone"]["name"]
    return f"{name} ({', '.join(told)})" if told else name
