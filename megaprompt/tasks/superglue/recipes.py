"""How the P-tuning paper trains on SuperGLUE, where the model is tuned (arXiv 2103.10385, section 4.2).

Few-shot it is what its scripts say, and their code by default; on full data, for which there are no scripts, what the
paper says. Both have AdamW for the weights and another for the prompt encoder, each with a learning rate of its own
that falls linearly to 0; gradients of both together are clipped.
"""

from __future__ import annotations

from dataclasses import replace

from megaprompt.prompting.recipe import Recipe, Tuning
from megaprompt.tasks.superglue.reading import Setting

LEARNING_RATES = (1e-5, 2e-5, 3e-5)
"""Of the weights, among which the paper chooses on full data."""
BATCH_SIZES = (16, 32)
"""Likewise."""

_EPOCHS = {"BoolQ": 10, "CB": 20, "COPA": 20, "MultiRC": 10, "RTE": 20, "WiC": 10, "WSC": 20}
"""On full data."""
_FEW_SHOT = {
    "BoolQ": (250, 1e-4, 0),
    "CB": (250, 1e-5, 0),
    "COPA": (3500, 1e-5, 0),
    "MultiRC": (250, 1e-4, 0),
    "RTE": (3500, 1e-4, 150),
    "WiC": (3500, 1e-5, 0),
    "WSC": (3500, 1e-4, 0),
}
"""Steps, learning rate of prompts, steps of warm-up."""
_PROMPT_RATE = 1e-4
"""On full data, where the paper names no rate of its own for prompts: its code advises a larger one."""
_WEIGHTS = Recipe(
    1e-5,
    weight_decay=0.1,
    decay=1.0,
    batch_size=16,
    max_epochs=100_000,
    patience=10,
    ties="kept",
    linear=True,
    decoupled=True,
    clip=1.0,
    dropout=True,
)


def paper_tuning(task: str, setting: Setting) -> Tuning:
    """The paper's recipes for one task."""
    if setting == "few-shot":
        steps, rate, warmup = _FEW_SHOT[task]
        weights = replace(_WEIGHTS, max_steps=steps, warmup_steps=warmup, dev_every=20)
    else:
        rate, weights = _PROMPT_RATE, replace(_WEIGHTS, max_epochs=_EPOCHS[task])
    return Tuning(weights, replace(weights, learning_rate=rate, weight_decay=0.0))
