"""Throughput of training and evaluation: megaprompt against the original algorithm and PEFT, in one interleaved run.

    python benchmarks/throughput.py [--relations P36,P30,P17,P47,P37] [--rounds 5] [--backbone smollm2-135m]
                                    [--dtype float32] [--pass-tokens 1024]

It runs on the GPU if there is one. All three train on the same facts with the same frozen model, batch size per
relation and threads, from the same prompt vectors, and their losses are compared. What is timed is a whole training
step: prompt encoder, backbone forward and backward, and Adam.

(a) original: what the code of "GPT Understands, Too" does for every step, written anew: one relation at a time, a
    padded batch of 8, token ids made by a Python loop per sample, the embeddings of pseudo tokens put in by a Python
    loop per sample and pseudo token, logits of the whole vocabulary at every position, and a sort of them all, in
    training too. (Its loss is taken where the paper says, just before the object, so that losses can be compared.)
(b) peft: `PromptEncoder` of the released package: all pseudo tokens are in front, one relation at a time, padded batch
    of 8, logits at every position. Its template is therefore <6>[X][Y]; its losses are compared with megaprompt's for
    that template.
(c) megaprompt: all relations in packed passes.

Prints one JSON object. Times are medians over rounds; ratios are medians of the ratios within a round. The share of the
peak relates the floating-point operations that megaprompt needs, counting only what it computes, to a large matrix
product of the same precision that is timed in the same rounds; the share of the memory bandwidth relates the weights,
which each pass must read at least once forward and once backward, to a large copy. In half precision the three do not
rank alike, since the others' logits are rounded: then the numbers of right answers are told.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megaprompt.backbone import Backbone, load_backbone
from megaprompt.config import PASS_TOKENS
from megaprompt.distributed.world import World
from megaprompt.engine.learner import Learner, TrainingSet
from megaprompt.engine.passes import Questions, answers
from megaprompt.engine.step import numbered_from
from megaprompt.engine.trainer import Trainer
from megaprompt.prompting.packing import PackedBatch, PassSize, pack
from megaprompt.prompting.prompt_encoder import PromptEncoder
from megaprompt.prompting.recipe import RECIPES
from megaprompt.prompting.template import Template
from megaprompt.tasks.lama.facts import load_data
from megaprompt.tasks.lama.questions import AskFor, lama_tasks, load_vocabulary
from megaprompt.tasks.task import Instance

BATCH = 8
FRONT = "<6>[X][Y]"


class Original:
    """The original algorithm for one relation, step by step as its code does it."""

    def __init__(self, backbone: Backbone, template: Template, encoder: PromptEncoder) -> None:
        self.model, self.tokenizer, self.encoder = backbone.model, backbone.tokenization.tokenizer, encoder
        self.hidden = backbone.hidden_size
        self.spell = [template.pieces[0], template.pieces[2]]
        self.optimizer = torch.optim.Adam(encoder.parameters(), RECIPES["fast"].learning_rate)
        self.pseudo = len(self.tokenizer)  # an id that stands for every pseudo token
        self.pad = self.tokenizer.eos_token_id

    def __call__(self, subjects: list[str], objects: list[int], train: bool) -> tuple[float, int]:
        """Mean loss and number of right answers; one optimizer step if `train`."""
        rows = []
        for subject in subjects:
            ids = self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(" " + subject))
            rows.append(torch.LongTensor([self.pseudo] * self.spell[0] + ids + [self.pseudo] * self.spell[1]))
        queries = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad).to(self.model.device)
        mask = torch.zeros_like(queries)
        for i, row in enumerate(rows):
            mask[i, : len(row)] = 1
        for_embedding = queries.clone()
        for_embedding[queries == self.pseudo] = self.pad
        embeddings = self.model.get_input_embeddings()(for_embedding)
        blocked = (queries == self.pseudo).nonzero().reshape(len(rows), -1, 2)[:, :, 1]
        replaced = self.encoder()
        for i in range(len(rows)):
            for k in range(sum(self.spell)):
                embeddings[i, blocked[i, k], :] = replaced[k, :].to(embeddings.dtype)
        logits = self.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        last = [len(row) - 1 for row in rows]
        self.at_targets = logits[torch.arange(len(rows)), last].detach()
        labels = torch.full_like(queries, -100)
        for i, gold in enumerate(objects):
            labels[i, last[i]] = gold
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        order = torch.argsort(logits, dim=2, descending=True)
        right = 0
        for i, gold in enumerate(objects):
            for token in order[i, last[i]].tolist():
                if token < self.pseudo:  # the first word of the vocabulary
                    right += token == gold
                    break
        if train:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item(), right


class Peft:
    """PEFT's released prompt encoder for one relation; if nothing else is said, shaped like megaprompt's."""

    def __init__(self, backbone: Backbone, **options: Any) -> None:
        from peft import PromptEncoderConfig, PromptEncoderReparameterizationType, TaskType, get_peft_model

        options = options or {
            "num_virtual_tokens": 6,
            "encoder_reparameterization_type": PromptEncoderReparameterizationType.LSTM,
            "encoder_hidden_size": backbone.hidden_size // 2,
            "encoder_num_layers": 2,
            "encoder_dropout": 0.0,
        }
        config = PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, **options)
        self.pseudo = config.num_virtual_tokens
        self.model = get_peft_model(backbone.model, config).eval()
        self.model.prompt_encoder.train()  # on a GPU, LSTMs go backward only so; it has no dropout
        for parameter in self.model.prompt_encoder.parameters():
            parameter.requires_grad_(True)
        self.tokenizer = copy.deepcopy(backbone.tokenization.tokenizer)
        if self.tokenizer.pad_token is None:  # as some versions of transformers read a GGUF file
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.optimizer = torch.optim.Adam(self.model.prompt_encoder.parameters(), RECIPES["fast"].learning_rate)

    def vectors(self) -> Tensor:
        """What its prompt encoder puts in front."""
        return self.model.get_prompt(batch_size=1)[0].detach()

    def __call__(self, subjects: list[str], objects: list[int], train: bool) -> float:
        """Mean loss; one optimizer step if `train`."""
        batch = self.tokenizer([" " + subject for subject in subjects], padding=True, return_tensors="pt")
        batch = batch.to(self.model.device)
        mask = batch["attention_mask"]
        logits = self.model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
        last = self.pseudo + mask.sum(1) - 1
        gold = torch.tensor(objects, device=logits.device)
        self.at_targets = logits[torch.arange(len(subjects), device=gold.device), last]
        loss = cross_entropy(self.at_targets.float(), gold)
        if train:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()


def timed(function: Callable[[], object]) -> float:
    """Seconds, until what a GPU was given to do is done."""
    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start


def finish() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def asked(learners: Sequence[Learner], batches: Mapping[str, list[int]]) -> list[Questions]:
    """A batch of training facts of every relation, as they stand in one pass."""
    questions, offset = [], 0
    for learner in learners:
        instances = [learner.data.train[i] for i in batches[learner.data.task]]
        questions.append(Questions(numbered_from(instances, offset), learner.data.objective))
        offset += learner.data.num_pseudo_tokens
    return questions


def flat(questions: Sequence[Questions]) -> list[Instance]:
    return [instance for each in questions for instance in each.instances]


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 3072
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(4))


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.randn(1 << 30 if device.type == "cuda" else 1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(4))


def tokens_of(batch: PackedBatch) -> Tensor:
    """Bool [rows, positions]: where a packed batch has tokens, and not padding."""
    own = torch.arange(batch.token_ids.shape[1]) + 1
    return (batch.position_ids != 0) | (batch.visible_until != own)


def operations(backbone: Backbone, batch: PackedBatch, train: bool) -> float:
    """Multiplications and additions that a packed pass needs: real tokens only, no padding, no masked scores."""
    output, config = backbone.model.get_output_embeddings(), backbone.model.config
    head = output.weight.numel()
    layers = sum(
        module.weight.numel()
        for module in backbone.model.modules()
        if getattr(module, "weight", None) is not None
        and module.weight.dim() == 2
        and module is not output
        and not isinstance(module, torch.nn.Embedding)
    )
    real = tokens_of(batch)
    scores = 4 * config.hidden_size * config.num_hidden_layers * int((batch.position_ids + 1)[real].sum())
    forward = 2 * layers * int(real.sum()) + scores + 2 * head * batch.targets.numel()
    return forward * (2 if train else 1)  # frozen weights: backward needs the gradient of the activations only


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbone", default="smollm2-135m")
    options.add_argument("--relations", default="P36,P30,P17,P47,P37")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--pass-tokens", type=int, default=PASS_TOKENS)
    args = options.parse_args()

    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, args.dtype)
    torch.backends.cudnn.allow_tf32 = False
    size = PassSize(pass_tokens=args.pass_tokens)
    backbone = load_backbone(args.backbone, dtype, device)
    data = load_data("world")
    everything = load_vocabulary("none", data, backbone.tokenization)
    relations = lama_tasks(
        data, backbone, AskFor(everything), names=args.relations.split(","), splits=("train",), limit=None, seed=0
    )
    template = Template.parse("<3>[X]<3>[Y]")
    recipe = RECIPES["fast"]

    def trainer_for(template: Template) -> Trainer:
        data = []
        for name, task in relations.items():
            train = task.instances("train", template)
            data.append(TrainingSet(name, task.objective, template.num_pseudo_tokens, train, train[:1]))
        return Trainer(backbone, data, recipe, size=size, world=World(device=device))

    ours, front = trainer_for(template), trainer_for(Template.parse(FRONT))
    originals = [Original(backbone, template, copy.deepcopy(learner.encoder)) for learner in ours.learners]
    subjects = {name: [example.fields["X"] for example in task.examples["train"]] for name, task in relations.items()}
    objects = {name: [example.gold for example in task.examples["train"]] for name, task in relations.items()}

    # PEFT starts its encoder in its own way: its vectors are given to megaprompt, to compare losses.
    pefts = [Peft(backbone) for _ in relations]

    times: dict[str, list[float]] = {}
    peaks, bandwidths, tokens = [], [], 0
    needed, losses = {"train": 0.0, "evaluation": 0.0}, {"original": 0.0, "peft": 0.0}
    answered = {"original": 0, "megaprompt": 0}
    for round_number in range(args.rounds + 1):  # the first one warms up
        for learner in ours.learners:
            learner.loss, learner.seen = 0.0, 0
            if learner.cursor + BATCH > len(learner.data.train):  # every round has full batches
                learner.epoch, learner.cursor = learner.epoch + 1, 0
        batches = {learner.data.task: copy.copy(learner).next_batch() for learner in ours.learners}
        chosen = {
            name: ([subjects[name][i] for i in batch], [objects[name][i] for i in batch])
            for name, batch in batches.items()
        }
        counted: dict[str, float] = {}

        loss_original: list[float] = []
        counted["train original"] = timed(
            lambda c=chosen, out=loss_original: out.extend(
                run(*c[name], train=True)[0] for run, name in zip(originals, relations, strict=True)
            )
        )
        queries = [instance.queries[0] for instance in flat(asked(ours.learners, batches))]
        counted["train megaprompt"] = timed(ours.train_step)
        loss_ours = [ln.loss / ln.seen for ln in ours.learners]
        if round_number == 0:  # from equal prompts; afterwards rounding may lead the runs apart
            losses["original"] = max(abs(a - b) / b for a, b in zip(loss_ours, loss_original, strict=True))
            needed["train"] = operations(backbone, pack(queries, ours.at.size.row_tokens), train=True)

        vectors = [run.vectors() for run in pefts]
        loss_peft: list[float] = []
        counted["train peft"] = timed(
            lambda c=chosen, out=loss_peft: out.extend(
                run(*c[name], train=True) for run, name in zip(pefts, relations, strict=True)
            )
        )
        if round_number == 0:
            in_front = flat(asked(front.learners, batches))
            batch = pack([instance.queries[0] for instance in in_front], 256).to(device)
            with torch.no_grad():
                logits = backbone(batch, torch.cat(vectors))[batch.target_of_query]
            gold = torch.tensor([instance.gold for instance in in_front], device=device)
            parts = cross_entropy(logits, gold, reduction="none").split([len(batches[name]) for name in relations])
            differences = [abs(p.mean().item() - q) / q for p, q in zip(parts, loss_peft, strict=True)]
            losses["peft"] = max(differences)

        with torch.no_grad():
            right: list[int] = []
            counted["evaluation original"] = timed(
                lambda out=right, c=chosen: out.extend(
                    run(*c[name], train=False)[1] for run, name in zip(originals, relations, strict=True)
                )
            )
            counted["evaluation peft"] = timed(
                lambda c=chosen: [run(*c[name], train=False) for run, name in zip(pefts, relations, strict=True)]
            )
        with torch.no_grad():
            prompts = torch.cat([run.encoder() for run in originals])
        questions = asked(ours.learners, batches)
        found: list = []
        counted["evaluation megaprompt"] = timed(
            lambda q=questions, p=prompts, out=found: out.extend(answers(ours.at, q, p))
        )
        packed = pack([instance.queries[0] for instance in flat(questions)], ours.at.size.row_tokens)
        needed["evaluation"] = operations(backbone, packed, train=False)
        tokens = int(tokens_of(packed).sum())
        ours_right = sum(int((each["rank"] == 1).sum()) for each in found)
        if sum(right) != ours_right and dtype == torch.float32:
            sys.exit("the original and megaprompt do not rank alike")
        if round_number:
            answered["original"] += sum(right)
            answered["megaprompt"] += ours_right
            peaks.append(matmul_rate(dtype, device))
            bandwidths.append(copy_rate(device))
            for name, seconds in counted.items():
                times.setdefault(name, []).append(seconds)

    facts = BATCH * len(relations)
    report: dict[str, object] = {
        "backbone": args.backbone,
        "relations": list(relations),
        "facts per step": facts,
        "tokens per step": tokens,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": args.dtype,
        "pass tokens": args.pass_tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "facts per second": {name: round(facts / statistics.median(t), 1) for name, t in times.items()},
        "megaprompt's tokens per second": {},
        "times faster than original": {},
        "times faster than peft": {},
        "relative difference of first losses": losses,
        "right answers": answered,
        "matrix product GFLOP/s": round(statistics.median(peaks) / 1e9, 1),
        "share of that peak": {},
        "copy GB/s": round(statistics.median(bandwidths) / 1e9, 1),
        "share of that bandwidth": {},
    }
    weights = sum(p.nbytes for p in backbone.parameters())
    for phase, short in (("train", "train"), ("evaluation", "evaluation")):
        mine = times[f"{phase} megaprompt"]
        for other in ("original", "peft"):
            ratio = statistics.median(a / b for a, b in zip(times[f"{phase} {other}"], mine, strict=True))
            report[f"times faster than {other}"][phase] = round(ratio, 2)  # type: ignore[index]
        shares = [needed[short] / seconds / peak for seconds, peak in zip(mine, peaks, strict=True)]
        report["share of that peak"][phase] = round(statistics.median(shares), 3)  # type: ignore[index]
        least = weights * (2 if phase == "train" else 1)
        read = [least / seconds / rate for seconds, rate in zip(mine, bandwidths, strict=True)]
        report["share of that bandwidth"][phase] = round(statistics.median(read), 3)  # type: ignore[index]
        report["megaprompt's tokens per second"][phase] = round(tokens / statistics.median(mine))  # type: ignore[index]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
