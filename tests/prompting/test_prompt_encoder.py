import pytest
import torch

from megaprompt.prompting.prompt_encoder import EmbeddingStatistics, PromptEncoder, new_prompt_encoder
from megaprompt.seeds import seed_of


def test_equation_4():
    """h_i = MLP([LSTM_forward : LSTM_backward]), written out with LSTM cells."""
    torch.manual_seed(0)
    encoder = PromptEncoder(5, 8).double()
    layer = encoder.embedding.weight
    for number in range(2):
        halves = []
        for suffix, order in (("", range(5)), ("_reverse", range(4, -1, -1))):
            cell = torch.nn.LSTMCell(layer.shape[1], 4).double()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(cell, name, getattr(encoder.lstm, f"{name}_l{number}{suffix}"))
            state, out = None, {}
            for i in order:
                state = cell(layer[i : i + 1], state)
                out[i] = state[0]
            halves.append(torch.cat([out[i] for i in range(5)]))
        layer = torch.cat(halves, dim=1)
    hidden = (layer @ encoder.mlp[0].weight.T + encoder.mlp[0].bias).relu()
    expected = hidden @ encoder.mlp[2].weight.T + encoder.mlp[2].bias
    torch.testing.assert_close(encoder(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("lstm", {"embedding", "lstm", "mlp"}), ("mlp", {"embedding", "mlp"}), ("none", {"embedding"})],
)
def test_kinds(kind, parts):
    encoder = PromptEncoder(6, 10, kind)
    assert encoder().shape == (6, 10)
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == parts


def test_odd_hidden_size():
    assert PromptEncoder(3, 7)().shape == (3, 7)


def test_initial_weights_depend_on_seed_and_relation_only():
    def weights(seed, relation):
        return new_prompt_encoder(3, 8, "lstm", seed=seed, relation=relation)()

    first = weights(0, "P36")
    torch.rand(17)
    state = torch.get_rng_state()
    assert torch.equal(first, weights(0, "P36"))
    assert torch.equal(state, torch.get_rng_state()), "the caller's random state must not move"
    assert not torch.equal(first, weights(1, "P36"))
    assert not torch.equal(first, weights(0, "P30"))


@pytest.mark.parametrize("kind", ["lstm", "mlp", "none"])
def test_start_near_embeddings(kind):
    near = EmbeddingStatistics(torch.arange(8.0), spread=2.0)
    vectors = new_prompt_encoder(6, 8, kind, seed=0, relation="P36", near=near)()
    torch.testing.assert_close(vectors.mean(0), near.mean, rtol=1e-4, atol=1e-4)
    assert (vectors - near.mean).square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-3)


def test_seed_of_is_fixed():
    assert seed_of(0, "P36", "epoch", 1) == 301479911653402070, "checkpoints and published runs depend on it"
    assert 0 <= seed_of(0, "P36") != seed_of(0, "P3", "6")


@pytest.mark.parametrize("kind", ["lstm", "mlp", "none"])
def test_a_single_vector_starts_at_the_mean_embedding(kind):
    near = EmbeddingStatistics(torch.linspace(-1, 1, 8), 0.5)
    encoder = new_prompt_encoder(1, 8, kind, seed=0, relation="P36", near=near)
    torch.testing.assert_close(encoder()[0], near.mean)
