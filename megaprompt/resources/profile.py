"""What a full pass of a backbone takes, found out from its shape alone: nothing is loaded.

The pass is run on tensors without data (PyTorch's FakeTensorMode), so what autograd saves, what is temporary, and the
floating-point operations are counted for any transformers model, not estimated by a formula.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, PreTrainedConfig, RobertaConfig

from megaprompt.backbone import read_config
from megaprompt.backbone.megatron import FairseqMegatronConfig
from megaprompt.backbone.packed import PackedModel, language_model
from megaprompt.errors import UsageError, first_line
from megaprompt.prompting.packing import PackedBatch, PassSize, pack, split_into_passes
from megaprompt.prompting.query import Query
from megaprompt.resources.layers import layers_of
from megaprompt.tasks.objective import Outputs

Method = Literal["p-tuning", "fine-tuning"]

_GPT2 = {"vocab_size": 50257}
_BERT = {"vocab_size": 28996}  # the cased models
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BUILT_IN: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "bert-base": (BertConfig, _BERT | _BASE),
    "bert-large": (BertConfig, _BERT | _LARGE),
    "roberta-base": (RobertaConfig, _ROBERTA | _BASE),
    "roberta-large": (RobertaConfig, _ROBERTA | _LARGE),
    "gpt2": (GPT2Config, _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "gpt2-medium": (GPT2Config, _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": (GPT2Config, _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": (GPT2Config, _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "megatron-11b": (FairseqMegatronConfig, {}),
}
"""Backbones whose shapes are known without their files."""


def shape_of(spec: str) -> PreTrainedConfig:
    """The configuration of a built-in name, a transformers directory, or a name on the model hub.

    Raises:
        UsageError: it is none of these.
    """
    if spec in BUILT_IN:
        kind, values = BUILT_IN[spec]
        return kind(**values)
    return read_config(spec)


@dataclass(frozen=True)
class Profile:
    """What a full pass of a backbone takes, wherever its parameters are."""

    numels: tuple[int, ...]  # elements of each parameter
    trace: tuple[tuple[int, ...], ...]  # the parameters of each module, in the order of the forward pass
    embedding_size: int  # of a vector that goes in
    tokens: int  # in the pass
    saved: tuple[int, ...]  # bytes kept for the backward pass when each module of the trace begins
    activations: int  # bytes at the peak, saved and temporary, without the parameters' gradients
    with_gradients: int  # the same with those that have come by then, none from passes before
    flops: int  # forward and backward
    layer_class: str = ""  # of layers that are alike
    layers: tuple[int, ...] = ()  # to which of them each module of the trace belongs; -1 if to none

    @property
    def parameters(self) -> int:
        """Elements of all parameters; shared ones count once."""
        return sum(self.numels)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it and still alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self.alive = 0
        self.gradients = self.peak_with_gradients = 0  # of parameters; they are kept
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        self.peak_with_gradients = max(self.peak_with_gradients, self.alive + self.gradients)
        return made

    def _free(self, size: int) -> None:
        self.alive -= size


@dataclass(frozen=True)
class Workload:
    """Facts that fill one pass: subjects of three tokens, in `<3>[X]<3>[Y]`, or between words for fine-tuning.

    With `whole_answers`, each has 16 candidates of two tokens: most tokens are read. (A bidirectional model reads one
    token of a query, as otherwise.)
    """

    method: Method
    relations: int
    size: PassSize
    causal: bool = True
    whole_answers: bool = False

    @classmethod
    def of(
        cls, config: PreTrainedConfig, method: Method, relations: int, size: PassSize, whole_answers: bool = False
    ) -> Workload:
        """The workload of a backbone: bidirectional ones cannot share the beginnings of queries."""
        causal = language_model(config) is AutoModelForCausalLM
        return cls(method, relations, size, causal, whole_answers and causal)

    def queries(self, count: int) -> list[Query]:
        """So many facts of one relation, its pseudo tokens numbered from 0."""
        before, after = ((-1, -2, -3), (-4, -5, -6)) if self.method == "p-tuning" else ((3, 4, 5), (6, 7, 8))
        mask = () if self.causal else (9,)

        def subject(i: int) -> tuple[int, int, int]:
            return 9 + i % 251, 9 + i // 251, 9 + i % 7

        if self.whole_answers:
            return [
                Query((*before, *subject(i), *after, 300 + j), (8, 9), (300 + j, 9))
                for i in range(count)
                for j in range(_CANDIDATES)
            ]
        return [
            Query((*before, *subject(i), *after, *mask), (8 + len(mask),), bidirectional=not self.causal)
            for i in range(count)
        ]

    def full_pass(self) -> list[Query]:
        """What a rank computes at once, of all relations."""
        relations = self.relations if self.method == "p-tuning" else 1  # which is fine-tuned alone
        each = -(-self.size.pass_tokens // relations // (6 + _CANDIDATES * self.whole_answers)) + 1
        many = [
            query._replace(tokens=tuple(t if t >= 0 else t - 6 * relation for t in query.tokens))
            for relation in range(relations)
            for query in self.queries(each)
        ]
        return [many[i] for i in split_into_passes([(query,) for query in many], self.size)[0]]


_CANDIDATES = 16


def _loss(work: Workload, values: Tensor, batch: PackedBatch, gold: Tensor) -> Tensor:
    """As the objectives of these answers have it."""
    if not work.whole_answers:
        return cross_entropy(values.index_select(0, batch.target_of_query).float(), gold)
    labels = torch.zeros_like(batch.target_of_query)
    query = torch.arange(len(gold))
    outputs = Outputs(values, batch.target_of_query, query.repeat_interleave(2), labels, query, query)
    return outputs.log_probabilities().sum()


def profile(config: PreTrainedConfig, dtype: torch.dtype, work: Workload) -> Profile:
    """Run a full pass without data, forward and backward.

    Raises:
        UsageError: there is no language model of this kind.
    """
    trainable = work.method == "fine-tuning"
    queries = work.full_pass()
    batch = pack(queries, work.size.row_tokens)
    trace: list[nn.Module] = []
    saved: list[int] = []

    def begins(module: nn.Module, _: Any) -> None:
        trace.append(module)
        saved.append(allocations.alive)

    def handed_on(parameter: Tensor) -> None:
        allocations.gradients += parameter.nbytes
        parameter.grad = None

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        try:
            inner = language_model(config).from_config(config, dtype=dtype)
        except ValueError as error:
            raise UsageError(f"--backbone: no language model ({first_line(error)})") from error
        model = PackedModel(inner, trainable)
        parameters = {parameter: i for i, parameter in enumerate(model.parameters())}
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(begins)
        layers = layers_of(model)
        layer_of = {module: i for i, layer in enumerate(layers) for module in layer.modules()}
        for parameter in parameters:
            if trainable:  # ZeRO-3 hands gradients on as they come
                parameter.register_post_accumulate_grad_hook(handed_on)
        inputs = batch.map(fake.from_tensor)
        prompts = None if trainable else torch.zeros(6 * work.relations, model.embedding_size, requires_grad=True)
        gold = torch.zeros(len(queries), dtype=torch.int64)
        known = [*parameters, *model.buffers(), *filter(torch.is_tensor, vars(inputs).values())]
        with FlopCounterMode(display=False) as flops, _Allocations(known) as allocations:
            _loss(work, model(inputs, prompts), inputs, gold).backward()
    return Profile(
        numels=tuple(parameter.numel() for parameter in parameters),
        trace=tuple(tuple(parameters[p] for p in module.parameters(recurse=False)) for module in trace),
        embedding_size=model.embedding_size,
        tokens=inputs.token_ids.numel(),
        saved=tuple(saved),
        activations=allocations.peak,
        with_gradients=allocations.peak_with_gradients,
        flops=flops.get_total_flops(),
        layer_class=type(layers[0]).__name__ if layers else "",
        layers=tuple(layer_of.get(module, -1) for module in trace),
    )
