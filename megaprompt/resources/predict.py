"""What a run needs in memory, per rank: predicted from shapes alone, before anything is loaded.

A pass is run on tensors without data (PyTorch's FakeTensorMode), so what autograd saves, what is temporary, and the
floating-point operations are counted for any transformers model, not estimated by a formula. Which parameters ZeRO-3
has gathered at once follows from the order of the modules in that pass, by the rules of DeepSpeed's coordinator. What
is left is arithmetic:

- P-tuning: the backbone's parameters (a share of them under ZeRO-3) and activations; no gradients, no optimizer.
  Each relation's prompt encoder takes 16 bytes per element: float32 weights, gradients, and Adam's two averages.
- Fine-tuning: 16 bytes per parameter in float32 (weights, gradients, two averages), 18 in half precision with float32
  copies; all of it shared among the ranks under ZeRO-3. See ZeRO (arXiv 1910.02054), section 3.1.

`megaprompt.resources.measure` measures the same; the README tells how well they agree.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
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

from megaprompt.backbone.megatron import FairseqMegatronConfig
from megaprompt.backbone.packed import PackedModel, language_model
from megaprompt.errors import UsageError, first_line
from megaprompt.prompting.packing import PassSize, pack, split_into_passes
from megaprompt.prompting.prompt_encoder import EncoderKind, PromptEncoder
from megaprompt.prompting.template import Query

Method = Literal["p-tuning", "fine-tuning"]
Place = Literal["device", "host", "nvme"]
CATEGORIES = ("parameters", "gathered", "gradients", "optimizer", "encoders", "activations", "buffers")

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
    from megaprompt.backbone import read_config

    return read_config(spec)


# -------------------------------------------------------------------------------------------------------- a pass, faked


@dataclass(frozen=True)
class Profile:
    """What a full pass of a backbone takes, wherever its parameters are."""

    numels: tuple[int, ...]  # elements of each parameter
    trace: tuple[tuple[int, ...], ...]  # the parameters of each module, in the order of the forward pass
    hidden_size: int
    tokens: int  # in the pass
    saved: tuple[int, ...]  # bytes kept for the backward pass when each module of the trace begins
    activations: int  # bytes at the peak, saved and temporary, without the parameters' gradients
    flops: int  # forward and backward

    @property
    def parameters(self) -> int:
        """Elements of all parameters; shared ones count once."""
        return sum(self.numels)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it and still alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self.alive = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return made

    def _free(self, size: int) -> None:
        self.alive -= size


@dataclass(frozen=True)
class Workload:
    """Facts that fill one pass: subjects of three tokens, in `<3>[X]<3>[Y]`, or between words for fine-tuning."""

    method: Method
    relations: int
    size: PassSize
    causal: bool = True

    @classmethod
    def of(cls, config: PreTrainedConfig, method: Method, relations: int, size: PassSize) -> Workload:
        """The workload of a backbone: bidirectional ones cannot share the beginnings of queries."""
        return cls(method, relations, size, language_model(config) is AutoModelForCausalLM)

    def queries(self, count: int) -> list[Query]:
        """So many facts of one relation, its pseudo tokens numbered from 0."""
        before, after = ((-1, -2, -3), (-4, -5, -6)) if self.method == "p-tuning" else ((3, 4, 5), (6, 7, 8))
        mask = () if self.causal else (9,)
        return [
            Query(
                (*before, 9 + i % 251, 9 + i // 251, 9 + i % 7, *after, *mask),
                (8 + len(mask),),
                bidirectional=not self.causal,
            )
            for i in range(count)
        ]

    def full_pass(self) -> list[Query]:
        """What a rank computes at once, of all relations."""
        relations = self.relations if self.method == "p-tuning" else 1  # which is fine-tuned alone
        each = -(-self.size.pass_tokens // relations // 6) + 1
        many = [
            query._replace(tokens=tuple(t if t >= 0 else t - 6 * relation for t in query.tokens))
            for relation in range(relations)
            for query in self.queries(each)
        ]
        return [many[i] for i in split_into_passes([(query,) for query in many], self.size)[0]]


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
        for parameter in parameters:
            if trainable:  # ZeRO-3 hands gradients on as they come
                parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        inputs = batch.map(fake.from_tensor)
        prompts = None if trainable else torch.zeros(6 * work.relations, model.hidden_size, requires_grad=True)
        gold = torch.zeros(len(queries), dtype=torch.int64)
        known = [*parameters, *model.buffers(), *filter(torch.is_tensor, vars(inputs).values())]
        with FlopCounterMode(display=False) as flops, _Allocations(known) as allocations:
            rows = model(inputs, prompts).index_select(0, inputs.target_of_query)
            cross_entropy(rows.float(), gold).backward()
    return Profile(
        numels=tuple(parameter.numel() for parameter in parameters),
        trace=tuple(tuple(parameters[p] for p in module.parameters(recurse=False)) for module in trace),
        hidden_size=model.hidden_size,
        tokens=inputs.token_ids.numel(),
        saved=tuple(saved),
        activations=allocations.peak,
        flops=flops.get_total_flops(),
    )


# --------------------------------------------------------------------------------------------------------------- ZeRO-3


@dataclass(frozen=True)
class Gathering:
    """What ZeRO-3 does with the parameters in a pass, in elements."""

    live: tuple[int, ...]  # gathered at once while each module runs, with the buffers of gathers that are under way
    total: int  # gathered in all
    persistent: int  # small ones that stay gathered

    def peak(self, profile: Profile, size: int) -> int:
        """Bytes that parameters of `size` bytes take when they and the activations together take most."""
        saved = (*profile.saved[1:], max(profile.saved))
        both = max(live * size + kept for live, kept in zip(self.live, (*saved, *reversed(saved)), strict=True))
        return both - max(profile.saved) + self.persistent * size


def gathering(profile: Profile, zero: Mapping[str, Any], ranks: int, gloo: bool) -> Gathering:
    """Follow DeepSpeed's coordinator of parameters through a pass, from the second pass on, when it knows their order.

    A module's parameters are gathered before it runs; then those that come next, up to the prefetch bucket; after it
    has run they are released, except those that are needed again within the reuse distance. Parameters gathered
    together share a buffer, from which each is copied; it lives until the last of them has been needed. (DeepSpeed
    0.19, PartitionedParameterCoordinator and AllGatherCoalescedHandle.)

    Args:
        gloo: whether that is what gathers; it receives into a buffer of its own.
    """
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    bucket = zero.get("stage3_prefetch_bucket_size", 50_000_000)
    limit = zero.get("stage3_max_live_parameters", 1_000_000_000)
    reuse = zero.get("stage3_max_reuse_distance", 1_000_000_000)
    numels = profile.numels
    persistent = {i for i, numel in enumerate(numels) if numel <= threshold}
    steps = [[i for i in module if i not in persistent] for module in (*profile.trace, *reversed(profile.trace))]
    queue = [(i, step) for step, module in enumerate(steps) for i in module]
    at = 0  # of the queue
    last_fetched_for = dict.fromkeys(range(len(numels)), -1)
    available: set[int] = set()
    waiting: dict[int, list[int]] = {}  # parameter -> the gather that it waits for, as the parameters still in it
    buffers: dict[int, int] = {}  # id of a gather -> elements of its buffer
    total = peak = 0
    lives: list[int] = []

    def gather(wanted: list[int]) -> None:
        nonlocal total, peak
        group = list(wanted)
        for i in wanted:
            waiting[i] = group
            total += numels[i]
        buffers[id(group)] = sum(numels[i] for i in wanted) if ranks > 1 else 0
        peak = max(peak, live() + (buffers[id(group)] if gloo else 0))

    def live() -> int:
        return sum(numels[i] for i in available) + sum(buffers.values())

    for step, module in enumerate(steps):
        peak = live()
        if missing := [i for i in dict.fromkeys(module) if i not in available and i not in waiting]:
            gather(missing)
        for i in dict.fromkeys(module):
            if (group := waiting.get(i)) is None:
                continue
            if len(group) == 1 and buffers[id(group)] in (0, numels[i]):  # gathered alone: the buffer is the parameter
                del buffers[id(group)], waiting[i]
                available.add(i)
                continue
            # The first of a gather that is waited for copies all of them out of the buffer.
            available.update(j for j, other in waiting.items() if other is group)
            peak = max(peak, live())
            group.remove(i)
            del waiting[i]
            if not group:
                buffers.pop(id(group))
        while at < len(queue) and queue[at][1] <= step:
            last_fetched_for[queue[at][0]] = max(last_fetched_for[queue[at][0]], queue[at][1])
            at += 1
        prefetched: list[int] = []
        room = min(limit - sum(numels[i] for i in available | set(waiting)), bucket)
        while at < len(queue) and sum(numels[i] for i in prefetched) < room:
            i, used = queue[at]
            at += 1
            last_fetched_for[i] = max(last_fetched_for[i], used)
            if i not in available and i not in waiting and i not in prefetched:
                prefetched.append(i)
        if prefetched:
            gather(prefetched)
        lives.append(max(peak, live()))
        kept = {i for i in module if last_fetched_for[i] > step}
        distance = 0
        for later in steps[step + 1 :]:
            if distance >= reuse:
                break
            kept.update(later)
            distance += sum(numels[i] for i in later)
        for i in set(module) - kept:
            available.discard(i)
    return Gathering(tuple(lives), total, sum(numels[i] for i in persistent))


# ----------------------------------------------------------------------------------------------------------- the ledger


@dataclass(frozen=True)
class Need:
    """Bytes that one rank needs, by place and category."""

    device: dict[str, int]
    host: dict[str, int]
    nvme: dict[str, int]
    gathering: Gathering

    def total(self, place: Place) -> int:
        """Bytes in one place."""
        return sum(getattr(self, place).values())


@dataclass(frozen=True)
class Job:
    """What is to be run, as far as memory depends on it."""

    method: Method
    dtype: torch.dtype = torch.float32
    zero: Mapping[str, Any] | None = (
        None  # the section zero_optimization of stage 3; None for a whole copy on each rank
    )
    ranks: int = 1
    relations: int = 1  # whose prompts are trained by one rank
    encoder: EncoderKind = "lstm"
    pseudo_tokens: int = 6
    on_cpu: bool = False  # devices are the host's cores


def predict(profile: Profile, job: Job) -> Need:
    """What one rank needs while it trains, at its peak."""
    size, parameters, ranks = job.dtype.itemsize, profile.parameters, job.ranks
    device, host, nvme = (Counter[str]() for _ in range(3))
    gathered = Gathering((), 0, 0)
    where_parameters = where_optimizer = device
    device["activations"] = profile.activations
    share = parameters
    if job.zero is not None:
        share = sum(-(-numel // ranks) for numel in profile.numels)
        offload = job.zero.get("offload_param", {}).get("device", "none")
        where_parameters = {"none": device, "cpu": host, "nvme": nvme}[offload]
        gathered = gathering(profile, job.zero, ranks, gloo=job.on_cpu)
        if ranks > 1 or (offload != "none" and not job.on_cpu):  # else what is gathered is where it was
            device["gathered"] = gathered.peak(profile, size)
        if offload == "nvme":
            swap = job.zero["offload_param"]
            host["buffers"] += swap.get("buffer_count", 5) * swap.get("buffer_size", 100_000_000) * size
    where_parameters["parameters"] = share * size
    if job.method == "p-tuning":
        device["encoders"] = job.relations * 16 * _encoder_numel(job, profile.hidden_size)
    elif job.zero is None:
        device["gradients"] = share * size
        device["optimizer"] = 2 * share * size
    else:
        offload = job.zero.get("offload_optimizer", {}).get("device", "none")
        where_optimizer = {"none": device, "cpu": host, "nvme": nvme}[offload]
        where_optimizer["optimizer"] = (4 + 8) * share  # float32 weights, in any case, and Adam's averages
        bucket = size * min(job.zero.get("reduce_bucket_size", 500_000_000), parameters)
        during_pass = device["activations"] + device["gathered"] + 2 * bucket  # the second one while it is scattered
        if offload == "none":
            device["gradients"] = size * share
            group = min(job.zero.get("sub_group_size", 1_000_000_000), share)
            in_step = bucket + (4 if size >= 4 else 4 + size) * group  # its gradients in a row, and in float32
        else:
            host["gradients"] = (size + 4) * share
            norm = 8 * -(-max(profile.numels) // ranks)  # of the largest partition, in float64
            in_step = bucket + (norm if job.on_cpu else 0)
            host["buffers"] += 0 if job.on_cpu else norm
        device["buffers"] += max(during_pass, in_step) - device["activations"] - device["gathered"]
    return Need(dict(device), dict(host), dict(nvme), gathered)


def _encoder_numel(job: Job, hidden_size: int) -> int:
    with torch.device("meta"):
        encoder = PromptEncoder(job.pseudo_tokens, hidden_size, job.encoder)
    return sum(parameter.numel() for parameter in encoder.parameters())
