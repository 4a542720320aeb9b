"""The prompt encoder of P-tuning (arXiv 2103.10385, equation 4): the only thing that is trained.

    h_i = MLP([LSTM_forward(h_0:i) : LSTM_backward(h_i:m)])

Pseudo tokens that are trained directly are discrete, unrelated parameters that start far apart and stay in poor local
minima; a small network that produces all of them together lets them depend on each other. Once trained, only its
output is needed (section 3.2): `PromptEncoder()()` is a matrix [pseudo tokens, hidden size], and that is what is saved.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from megaprompt.seeds import seed_of

warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # said when oneDNN is switched off

EncoderKind = Literal["lstm", "mlp", "none"]


class EmbeddingStatistics(NamedTuple):
    """Where a backbone's token embeddings are: their mean [hidden size], and the RMS distance of an element from it."""

    mean: Tensor
    spread: float


class PromptEncoder(nn.Module):
    """Embedding -> 2-layer bidirectional LSTM -> two-layer ReLU MLP, all of the backbone's hidden size.

    `kind="mlp"` leaves the LSTM out, `kind="none"` trains the embedding itself; both are the ablations of the paper's
    discussion of equation 4.
    """

    def __init__(self, num_pseudo_tokens: int, hidden_size: int, kind: EncoderKind = "lstm") -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_pseudo_tokens, hidden_size)
        self.offset: Tensor | None
        self.register_buffer("offset", None)  # [pseudo tokens, hidden size], constant
        self.lstm: nn.LSTM | None = None
        self.mlp: nn.Sequential | None = None
        if kind == "lstm":
            # Half the width in each direction, so that both together are one hidden size.
            self.lstm = nn.LSTM(hidden_size, hidden_size // 2, num_layers=2, bidirectional=True)
        if kind != "none":
            width = 2 * (hidden_size // 2) if kind == "lstm" else hidden_size
            self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self) -> Tensor:
        """The prompt vectors [pseudo tokens, hidden size], in the order in which they stand in the template."""
        vectors = self.embedding.weight
        if self.lstm is not None:
            # On CPUs, oneDNN's LSTM repacks the weights in every call, which costs more than so short a sequence.
            with torch.backends.mkldnn.flags(enabled=False):
                vectors = self.lstm(vectors)[0]
        if self.mlp is not None:
            vectors = self.mlp(vectors)
        return vectors if self.offset is None else vectors + self.offset

    @torch.no_grad()
    def start_near(self, embeddings: EmbeddingStatistics) -> None:
        """Shift and scale the last layer, for vectors around the mean embedding and a quarter of the spread apart."""
        vectors = self()
        center = vectors.mean(0)
        apart = (vectors - center).square().mean().sqrt()
        scale = 0.25 * embeddings.spread / apart if apart > 0 else torch.ones_like(apart)  # a single one is at the mean
        mean = embeddings.mean.to(center)
        if self.mlp is None:
            self.embedding.weight.sub_(center).mul_(scale).add_(mean)
        else:
            last = self.mlp[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(scale)
            last.bias.sub_(center).mul_(scale).add_(mean)

    @torch.no_grad()
    def start_at(self, vectors: Tensor) -> None:
        """Begin with exactly these vectors [pseudo tokens, hidden size]; a network learns what is added to them."""
        if self.mlp is None:
            self.embedding.weight.copy_(vectors)
        else:
            self.offset = vectors.to(self.embedding.weight) - self()


def new_prompt_encoder(
    num_pseudo_tokens: int,
    hidden_size: int,
    kind: EncoderKind,
    *,
    seed: int,
    relation: str,
    near: EmbeddingStatistics | None = None,
    vectors: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> PromptEncoder:
    """A prompt encoder whose initial weights depend on the seed and the relation's name only.

    So a relation starts from the same weights whatever else is trained beside it, and on every rank.

    Args:
        near: start with vectors close to the mean of these embeddings. PyTorch's own initialization gives vectors that
            are almost equal and unlike any embedding, and the first third of a short training is spent on leaving them.
        vectors: start with exactly these [pseudo tokens, hidden size].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, relation, "prompt encoder"))
        encoder = PromptEncoder(num_pseudo_tokens, hidden_size, kind).to(dtype)
    if near is not None:
        encoder.start_near(near)
    if vectors is not None:
        encoder.start_at(vectors)
    return encoder


def number_of_parameters(pseudo_tokens: int, hidden_size: int, kind: EncoderKind) -> int:
    """Of one encoder, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in PromptEncoder(pseudo_tokens, hidden_size, kind).parameters())
