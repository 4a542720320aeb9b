"""Prompts learned on a GPU are those of the CPU, and a stopped training goes on exactly."""

import warnings
from dataclasses import replace

import pytest
import torch

from megaprompt.distributed.world import World
from megaprompt.engine.trainer import Hooks, Interrupted
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.recipe import Recipe
from tests.engine.test_trainer import RECIPE, trainer_for


@pytest.fixture
def exactly_repeatable():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def learn(backbone, device, recipe=RECIPE, **options):
    trainer = trainer_for(backbone.to(device), recipe=recipe, world=World(device=device), **options)
    return trainer.train(Hooks())


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("gpt2", torch.float64, 1e-9),
        ("llama", torch.float64, 1e-6),  # its rotary embeddings are in float32, whatever the model's precision
        ("gpt2", torch.float32, 1e-3),
        ("llama", torch.float32, 1e-3),
    ],
    ids=str,
)
def test_prompts_are_those_of_the_cpu(make_backbone, gpu, kind, dtype, tolerance):
    """Adam divides by gradients that may be small: differences of rounding grow with the steps."""
    cpu = learn(make_backbone(kind, dtype), torch.device("cpu"))
    found = learn(make_backbone(kind, dtype), gpu)
    for relation, expected in cpu.items():
        vectors, others = found[relation].kept.vectors, expected.kept.vectors
        assert vectors.device.type == "cpu"
        assert (vectors - others).norm() < tolerance * others.norm()
        assert found[relation].best_epoch == expected.best_epoch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_training_equals_uninterrupted(make_backbone, gpu, exactly_repeatable, tmp_path, dtype):
    backbone, options = make_backbone("gpt2", dtype).to(gpu), {"world": World(device=gpu)}
    whole = trainer_for(backbone, **options).train(Hooks())
    again = trainer_for(backbone, **options).train(Hooks())
    first = trainer_for(backbone, **options)
    with pytest.raises(Interrupted):
        first.train(Hooks(should_stop=lambda: first.step == 5))
    torch.save(first.states(), tmp_path / "state.pt")
    second = trainer_for(backbone, **options)
    states = torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu")
    second.restore(first.shared_state(), states.get)
    resumed = second.train(Hooks())
    for relation, learned in whole.items():
        assert torch.equal(learned.kept.vectors, again[relation].kept.vectors)
        assert torch.equal(learned.kept.vectors, resumed[relation].kept.vectors)


def test_sizes_of_passes_do_not_matter(make_backbone, gpu):
    recipe = Recipe(0.01, 5e-4, 0.98, batch_size=4, max_epochs=2, patience=2)
    wide, narrow = (
        learn(make_backbone("llama"), gpu, recipe, size=size) for size in (PassSize(), PassSize(16, 16))
    )  # fmt: skip
    for relation, learned in wide.items():
        torch.testing.assert_close(learned.kept.vectors, narrow[relation].kept.vectors, rtol=1e-9, atol=1e-11)


def test_more_passes_do_not_wait_for_the_gpu_more_often(make_backbone, gpu):
    """At most once for each pass: while the GPU computes it, the next one is packed and copied."""
    backbone, recipe = make_backbone("gpt2", torch.float32).to(gpu), replace(RECIPE, batch_size=8)

    def waits(pass_tokens: int) -> tuple[int, int]:
        trainer = trainer_for(backbone, recipe=recipe, world=World(device=gpu), size=PassSize(16, pass_tokens))
        trainer.train_step()
        passes = []
        counting = backbone.model.register_forward_pre_hook(lambda *_: passes.append(1))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            counting.remove()
        return sum("synchronizing" in str(warning.message) for warning in caught), len(passes)

    (few, one), (many, several) = waits(4096), waits(16)
    assert several > one
    assert many - few <= several - one
