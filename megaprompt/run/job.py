"""Probing: score manual prompts, learn prompts, score them, and write everything down. One call does the whole job.

from megaprompt.config import ProbeConfig
from megaprompt.run.job import probe
results = probe(ProbeConfig(relations=("P36", "P30"), out=Path("runs/two")))
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprompt import __version__
from megaprompt.backbone import Backbone, dtype_of, load_backbone
from megaprompt.config import ProbeConfig
from megaprompt.console import progress
from megaprompt.distributed.launch import World, joined_world
from megaprompt.distributed.loss_scale import NO_SCALING
from megaprompt.distributed.zero3 import DeepSpeedSettings, read_deepspeed_config
from megaprompt.engine.evaluation import Predictions, metrics, predict, predict_together, summarize
from megaprompt.engine.fine_tuning import FineTuner
from megaprompt.engine.training import Hooks, Interrupted, Learned, Trainer
from megaprompt.errors import MegapromptError, UsageError
from megaprompt.methods import autoprompt
from megaprompt.methods.discrete import DiscretePrompt, read_discrete_prompts, usable_prompts
from megaprompt.prompting.packing import PassSize
from megaprompt.prompting.recipe import Recipe
from megaprompt.prompting.template import Template, default_template
from megaprompt.report.html import write_report
from megaprompt.run.directory import RunDirectory
from megaprompt.run.progress import ProgressFile
from megaprompt.run.saved_prompts import SavedPrompt
from megaprompt.tasks.lama.facts import SPLITS, Data, Fact, Split, load_data
from megaprompt.tasks.lama.usable_facts import UsableRelation, Vocabulary, load_vocabulary, usable_relations
from megaprompt.tasks.task import Examples, Task

logger = logging.getLogger(__name__)

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_CHECKPOINT_SECONDS = 60.0  # between checkpoints, and at least 20 times as long as writing one takes


def probe(config: ProbeConfig, world: World | None = None) -> dict[str, Any]:
    """Run or resume a probe; returns what is in results.json.

    Raises:
        UsageError: an option cannot work.
        MegapromptError: something in the data, on the disk or in training went wrong.
    """
    if world is None:
        with joined_world(force=config.deepspeed is not None) as world:
            return probe(config, world)
    status = ProgressFile(config.out, world.is_main)
    with status.ending():
        return _probe(config, world, status)


def _probe(config: ProbeConfig, world: World, status: ProgressFile) -> dict[str, Any]:
    recipe = config.training_recipe()
    if config.template is not None:
        Template.parse(config.template)  # wrong ones are told at once
    deepspeed = read_deepspeed_config(config.deepspeed) if config.deepspeed is not None else DeepSpeedSettings()
    data = load_data(config.data)
    discrete = {name: read_discrete_prompts(path) for name, path in config.discrete_prompts().items()}
    run = RunDirectory.open(config) if world.is_main else RunDirectory(config.out)
    results = world.gather(run.read_results() if config.resume else {})[0]
    if results.get("complete"):
        logger.info("%s is complete; nothing to resume", run.path)
        return results

    if config.resume:
        status.phase("loading")
    if None not in (config.dtype, deepspeed.dtype) and getattr(torch, config.dtype or "") != deepspeed.dtype:
        raise UsageError(f"--dtype {config.dtype}: {config.deepspeed} says {deepspeed.dtype}; leave one of them out")
    dtype = deepspeed.dtype or dtype_of(config.dtype, world.device)
    fine_tuning = [method for method in config.methods if method in FINE_TUNING]
    if fine_tuning:
        _check_fine_tuning(config, deepspeed)
    backbone = load_backbone(config.backbone, dtype, world.device, deepspeed.sharding)
    size = backbone.exact_size(PassSize(config.row_tokens, config.pass_tokens))
    vocabulary = load_vocabulary(config.vocab, data, backbone)
    template = Template.parse(config.template or default_template(backbone.causal))
    template.render("subject", backbone.text_encoder())  # finds a template that does not suit the backbone
    relations = usable_relations(
        data,
        backbone,
        vocabulary,
        names=config.relations,
        splits=SPLITS if set(config.methods) - {"manual"} else ("train", "test") if discrete else ("test",),
        limit=config.limit_facts,
        seed=config.seed,
    )
    if world.is_main and not config.resume:  # everything that can be wrong from the start has been checked
        run.write_config(config)
    if not results:
        results = {
            "format": 1,
            "complete": False,
            "megaprompt": __version__,
            "backbone": {
                "name": backbone.name,
                "fingerprint": backbone.fingerprint,
                "dtype": str(backbone.model.dtype).removeprefix("torch."),
                "hidden_size": backbone.hidden_size,
                "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in backbone.parameters()),
            },
            "data": _describe(data, vocabulary, relations),
            "methods": {"majority": _majority(relations)},
            "environment": _environment(world),
            "timing": {},
        }
    if results["backbone"]["fingerprint"] != backbone.fingerprint:
        raise MegapromptError(
            f"--resume: the weights of {backbone.name} are not those that {run.path} was started with"
        )
    job = _Job(config, world, run, deepspeed, backbone, vocabulary, relations, results, status, size)
    del backbone  # a job that fine-tunes lets go of it
    for name in relations if {"manual", "manual+fine-tuning"} & set(config.methods) else ():
        job.manual_template(name)  # a missing one is told before anything is computed
    if "manual" in config.methods and "manual" not in results["methods"]:
        job.manual()
    if "p-tuning" in config.methods and "p-tuning" not in results["methods"]:
        job.p_tuning(None if config.init == "manual" else template, recipe)
    for name, prompts in discrete.items():
        job.discrete(name, prompts)
    if "autoprompt" in config.methods and "autoprompt" not in results["methods"]:
        job.autoprompt()
    for method in fine_tuning:
        if method not in results["methods"]:
            job.fine_tuning(method)
    results["complete"] = True
    job.save()
    world.barrier()
    return results


FINE_TUNING = ("fine-tuning", "manual+fine-tuning")
_SUBJECT_ALONE = Template.parse("[X] [Y]")


def _check_fine_tuning(config: ProbeConfig, deepspeed: DeepSpeedSettings) -> None:
    """See that weights that are trained have float32 masters: steps of 5e-6 vanish in half precision."""
    half = config.dtype in ("float16", "bfloat16") or deepspeed.dtype is not None
    if half and deepspeed.sharding is None:
        raise UsageError(
            "--methods fine-tuning in half precision needs ZeRO-3's float32 copies of the weights: give --deepspeed "
            "ds_configs/zero3_bf16.json, or --dtype float32 (the default for fine-tuning without --deepspeed)"
        )


Scored = tuple[dict[str, Any], Predictions]
"""What a method's results say of one relation, and its predictions on test."""


@dataclass
class _Job:
    """The parts of a run, handed to each method."""

    config: ProbeConfig
    world: World
    run: RunDirectory
    deepspeed: DeepSpeedSettings
    backbone: Backbone
    vocabulary: Vocabulary
    relations: dict[str, UsableRelation]
    results: dict[str, Any]
    status: ProgressFile
    size: PassSize

    def save(self, report: bool = True) -> None:
        """Write the results so far, and the report."""
        self.results["peak_memory_bytes"] = _peak_memory(self.world)
        if self.world.is_main:
            self.run.write_results(self.results)
            if report:
                write_report(self.run.path)

    def each_relation(
        self,
        methods: Sequence[str],
        score: Callable[[str, Callable[[], bool]], Mapping[str, Scored]],
        *,
        title: str | None = None,
        own_progress: bool = False,
    ) -> None:
        """Score all relations by methods, and write down what is known of each at once: a stopped run goes on there.

        Args:
            score: gets a relation and a function that tells whether to stop; gives each method's scores.
            title: what the user is told that is being done; the methods, if not given.
            own_progress: `score` shows its progress.

        Raises:
            Interrupted: a signal said so on some rank.
        """
        title = title or " and ".join(methods)
        unfinished = self.results.setdefault("unfinished", {})
        rows = {method: unfinished.setdefault(method, {}) for method in methods}
        todo = [name for name in self.relations if any(name not in done for done in rows.values())]
        start, count = time.monotonic(), len(self.relations)
        shown = progress(title, count, self.world.is_main and not own_progress, unit="relations")
        with _stop_signals() as should_stop, shown as update:
            for number, name in enumerate(todo, start=count - len(todo) + 1):
                self.status.phase(f"{title} {name}")
                if self.world.max_(torch.tensor(int(should_stop())), "schedule"):
                    raise Interrupted(f"interrupted before {name}; continue with --resume")
                for method, (row, found) in score(name, should_stop).items():
                    rows[method][name] = row | metrics(found.rank)
                    self.write_predictions(method, name, found)
                self.save(report=False)
                update(number)
        for method in methods:
            done = {name: rows[method][name] for name in self.relations}
            self.results["methods"][method] = {"relations": done, **summarize(done)}
            self.results["timing"][method] = {"seconds": time.monotonic() - start}
            del unfinished[method]
        if not unfinished:
            del self.results["unfinished"]
        self.save()

    def manual(self) -> None:
        """Score the prompts that came with the data."""

        def score(name: str, _: Any) -> dict[str, Scored]:
            template = self.manual_template(name)
            dev = self.score(name, template, None, "dev").rank
            row = self._row(name, template, dev_p_at_1=metrics(dev)["p_at_1"] if len(dev) else None)
            return {"manual": (row, self.score(name, template, None, "test"))}

        self.each_relation(["manual"], score)

    def manual_template(self, name: str) -> Template:
        """The prompt that came with the data.

        Raises:
            MegapromptError: there is none for this relation.
        """
        text = self.relations[name].relation.template
        if text is None:
            raise MegapromptError(
                f"relation {name} has no manual prompt: add it to relations.jsonl, or use --methods p-tuning"
            )
        return Template.parse(text)

    def task(self, name: str, template: Template, vectors: Tensor | None = None) -> Task:
        """The facts to learn a relation from."""
        train, dev = (self.relations[name].examples(split, template, self.backbone) for split in ("train", "dev"))
        return Task(name, template.num_pseudo_tokens, train, dev, vectors)

    def learn(self, trainer: Trainer, templates: Mapping[str, Template]) -> dict[str, Learned]:
        """Train prompts, with checkpoints, log and progress; saves the best of each relation."""
        run, world = self.run, self.world
        seconds, log_size = 0.0, 0  # before this process started
        if self.config.resume and (checkpoint := run.load_checkpoint(world)) is not None:
            trainer.restore(checkpoint.step, checkpoint.about["stopped_after"], checkpoint.read)
            seconds, log_size = checkpoint.about["seconds"], checkpoint.about["log_size"]
        if world.is_main:
            run.truncate_log(log_size)
        start = saved = time.monotonic()
        pause = _CHECKPOINT_SECONDS
        first_step = trainer.step
        if world.is_main:
            self.status.epochs(run.read_log())
        self.status.phase("p-tuning")

        def log(line: dict[str, Any]) -> None:
            self.status.epochs([line])
            steps = max(1, trainer.step - first_step)
            if world.size > 1:
                line["sent_bytes_per_step"] = {what: round(count / steps) for what, count in world.sent.items()}
            if board is not None:
                run.append_log(line)
                for name in ("train_loss", "dev_p_at_1", "dev_mrr"):
                    board.add_scalar(f"{name}/{line['relation']}", line[name], line["step"])

        def show(done: int, total: int, step: int) -> None:
            update(done, total)
            self.status.facts(done, total, step)

        def should_save() -> bool:
            return world.is_main and time.monotonic() - saved > pause

        def save() -> None:
            nonlocal saved, pause
            before = time.monotonic()
            spent = {"seconds": seconds + before - start, "log_size": run.log_size()}
            about = world.gather({"stopped_after": trainer.stopped_after, **spent})[0]
            run.save_checkpoint(world, trainer.step, trainer.states(), about)
            saved = time.monotonic()
            pause = max(_CHECKPOINT_SECONDS, 20 * (saved - before))

        board = _tensorboard(run.path / "tensorboard", trainer.step) if world.is_main else None
        world.sent.clear()
        with _stop_signals() as should_stop, progress("p-tuning", trainer.facts()[1], world.is_main) as update:
            hooks = Hooks(log, show, should_save, should_stop, save)
            learned = trainer.train(self.vocabulary.allowed, hooks)
            save()
        self.results["communication"] = {
            "steps": trainer.step - first_step,
            "sent_bytes_by_rank": world.gather(dict(world.sent)),
        }
        if board is not None:
            board.close()
        self.results["timing"]["training_seconds"] = seconds + time.monotonic() - start
        if world.is_main:
            for name, found in learned.items():
                SavedPrompt(
                    relation=name,
                    template=templates[name].text,
                    backbone=self.backbone.name,
                    fingerprint=self.backbone.fingerprint,
                    data=self.config.data,
                    vectors=found.prompts,
                    label=self.relations[name].relation.label,
                    dev_p_at_1=found.dev["p_at_1"],
                ).save(run.path / "prompts" / f"{name}.safetensors")
        return learned

    def p_tuning(self, template: Template | None, recipe: Recipe) -> None:
        """Learn prompts, from the manual ones if there is no template, and score the best of each relation on test."""
        tasks: list[Task] = []
        templates: dict[str, Template] = {}
        for name in self.relations:
            if template is not None:
                templates[name], vectors = template, None
            else:
                templates[name], tokens = self.manual_template(name).softened(self.backbone.text_encoder())
                vectors = self.backbone.embeddings(tokens)
            tasks.append(self.task(name, templates[name], vectors))
        half = self.backbone.model.dtype == torch.float16
        trainer = Trainer(
            self.backbone,
            tasks,
            recipe,
            encoder=self.config.encoder,
            seed=self.config.seed,
            size=self.size,
            world=self.world,
            groups=self.config.relation_groups,
            loss_scale=self.deepspeed.loss_scale if half else NO_SCALING,
        )
        learned = self.learn(trainer, templates)

        def score(name: str, _: Any) -> dict[str, Scored]:
            found = learned[name]
            row = self._row(name, templates[name], dev_p_at_1=found.dev["p_at_1"], epochs=found.epochs)
            return {
                "p-tuning": (row, self.score(name, templates[name], found.prompts.to(self.backbone.device), "test"))
            }

        self.each_relation(["p-tuning"], score, title="test")

    def discrete(self, name: str, prompts: Mapping[str, Sequence[DiscretePrompt]]) -> None:
        """Score discrete prompts: the best one on train and, if a relation has several, all together.

        A relation without any prompt that the backbone can read (causal ones cannot if [X] is behind [Y]) gets its
        manual one.
        """
        methods = {f"{name} best": False, f"{name} ensemble": True}
        if all(len(prompts.get(relation, ())) < 2 for relation in self.relations):
            methods = {name: False}
        if all(method in self.results["methods"] for method in methods):
            return
        encoder = self.backbone.text_encoder()

        def fits(template: Template) -> bool:
            try:
                return bool(template.render("subject", encoder).tokens)
            except UsageError:
                return False

        def score(relation: str, _: Any) -> dict[str, Scored]:
            found = usable_prompts(prompts.get(relation, ()), fits)
            own = found or [DiscretePrompt(self.manual_template(relation))]
            best = own[self._best_on_train(relation, [prompt.template for prompt in own])]
            row = self._row(relation, best.template, prompts=len(found))
            scored = dict.fromkeys(methods, (row, self.score(relation, best.template, None, "test")))
            for method, together in methods.items():
                if together and len(own) > 1:
                    scored[method] = (row | {"template": f"{len(own)} prompts"}, self._together(relation, own))
            return scored

        self.each_relation(list(methods), score, title=name)

    def autoprompt(self) -> None:
        """Search for prompts with AutoPrompt, and score the best of each relation on test."""
        search = autoprompt.Search(self.config.autoprompt_steps)
        given = self.config.template
        template = Template.parse(given) if given else autoprompt.default_template(self.backbone.causal)

        def score(name: str, should_stop: Callable[[], bool]) -> dict[str, Scored]:
            with self.training("autoprompt", name, should_stop, unit="steps") as hooks:
                found = autoprompt.search(
                    self.backbone,
                    self.task(name, template),
                    search,
                    allowed=self.vocabulary.allowed,
                    seed=self.config.seed,
                    size=self.size,
                    world=self.world,
                    hooks=hooks,
                )
            test = autoprompt.filled(self.relations[name].examples("test", template, self.backbone), found.tokens)
            row = self._row(name, template, dev_p_at_1=found.dev["p_at_1"], tokens=found.tokens, steps=found.step)
            row["template"] = autoprompt.text_of(template, found.tokens, self.backbone)
            return {"autoprompt": (row, self.predict(test, None, top=10))}

        self.each_relation(["autoprompt"], score, own_progress=True)
        rows = self.results["methods"]["autoprompt"]["relations"]
        if self.world.is_main:
            self.run.write_discrete({name: row["template"] for name, row in rows.items()})

    def _best_on_train(self, name: str, templates: Sequence[Template]) -> int:
        """Which of the prompts has the best P@1 (of equal ones: MRR) on the training facts of a relation."""
        if len(templates) == 1:
            return 0
        examples = [self.relations[name].examples("train", template, self.backbone) for template in templates]
        queries = [query for wording in examples for query in wording.queries]
        objects = [token for wording in examples for token in wording.objects]
        found = self.predict(Examples(queries, objects), None)  # all at once, since they share beginnings
        scores = [metrics(rank) for rank in found.rank.split(len(examples[0]))]
        return max(range(len(scores)), key=lambda i: (scores[i]["p_at_1"], scores[i]["mrr"]))

    def _together(self, name: str, prompts: Sequence[DiscretePrompt]) -> Predictions:
        """Rank the test facts of a relation by several prompts together."""
        wordings = [self.relations[name].examples("test", prompt.template, self.backbone) for prompt in prompts]
        return predict_together(
            self.backbone,
            [wording.queries for wording in wordings],
            [prompt.weight for prompt in prompts],
            wordings[0].objects,
            allowed=self.vocabulary.allowed,
            world=self.world,
            size=self.size,
            top=10,
        )

    def fine_tuning(self, method: str) -> None:
        """Train the whole model on each relation, and score the best model on test.

        The weights are not kept. What is known of a relation is written down as soon as it is done.
        """
        sharded = self.deepspeed.sharding is not None
        dtype = self.backbone.model.dtype if sharded or self.config.dtype else torch.float32
        deepspeed = self.deepspeed.for_training(dtype)

        def score(name: str, should_stop: Callable[[], bool]) -> dict[str, Scored]:
            del self.backbone  # before the next one is loaded
            gc.collect()
            self.backbone = load_backbone(self.config.backbone, dtype, self.world.device, deepspeed, trainable=True)
            template = self.manual_template(name) if method == "manual+fine-tuning" else _SUBJECT_ALONE
            task = self.task(name, template)
            tuner = FineTuner(
                self.backbone,
                task,
                self.config.fine_tuning_recipe(),
                seed=self.config.seed,
                size=self.size,
                world=self.world,
                deepspeed=deepspeed,
            )
            with self.training(method, name, should_stop) as hooks:
                found = tuner.train(self.vocabulary.allowed, hooks, lambda: self.score(name, template, None, "test"))
            row = self._row(name, template, dev_p_at_1=tuner.course.best["p_at_1"], epochs=tuner.course.epoch)
            return {method: (row, found)}

        self.each_relation([method], score, own_progress=True)

    @contextmanager
    def training(self, method: str, name: str, should_stop: Callable[[], bool], unit: str = "facts") -> Iterator[Hooks]:
        """Log and progress of a method that trains one relation after the other."""
        title = f"{method} {name} ({list(self.relations).index(name) + 1} of {len(self.relations)})"
        facts = len(self.relations[name].facts["train"])  # until it says how much there is to do
        with progress(title, facts, self.world.is_main, unit) as update:

            def log(line: dict[str, Any]) -> None:
                if self.world.is_main:
                    self.run.append_log({"method": method, **line})

            def show(done: int, total: int, step: int) -> None:
                update(done, total)
                self.status.facts(done, total, step)

            yield Hooks(log=log, progress=show, should_stop=should_stop)

    def score(self, name: str, template: Template, prompts: Tensor | None, split: Split) -> Predictions:
        """Rank the facts of one split of a relation with one prompt."""
        examples = self.relations[name].examples(split, template, self.backbone)
        return self.predict(examples, prompts, top=10 if split == "test" else 0)

    def predict(self, examples: Examples, prompts: Tensor | None, top: int = 0) -> Predictions:
        """Rank the objects of any queries."""
        return predict(
            self.backbone,
            examples.queries,
            examples.objects,
            prompts,
            allowed=self.vocabulary.allowed,
            world=self.world,
            size=self.size,
            top=top,
        )

    def _row(self, name: str, template: Template, **more: Any) -> dict[str, Any]:
        usable = self.relations[name]
        row = {"type": usable.relation.type, "facts": len(usable.facts["test"]), "epochs": None}
        return {**row, "template": template.text, **more}

    def write_predictions(self, method: str, name: str, found: Predictions) -> None:
        """Put a method's predictions on test beside those of other methods."""
        if self.world.is_main:
            kept = [line for line in self.run.read_predictions(name) if line["method"] != method]
            facts = self.relations[name].facts["test"]
            self.run.write_predictions(name, [*kept, *prediction_lines(method, facts, found, self.backbone)])


def prediction_lines(
    method: str, facts: Sequence[Fact], found: Predictions, backbone: Backbone
) -> Iterator[dict[str, Any]]:
    """One JSON-ready line per fact: its rank, probability, and the best answers."""
    for i, fact in enumerate(facts):
        answers = zip(found.top_tokens[i].tolist(), found.top_log_probability[i].exp().tolist(), strict=True)
        yield {
            "method": method,
            "subject": fact.subject,
            "object": fact.object,
            "rank": int(found.rank[i]),
            "probability": found.log_probability[i].exp().item(),
            "top": [[backbone.text_of(token), round(p, 6)] for token, p in answers],
        }


def _majority(relations: Mapping[str, UsableRelation]) -> dict[str, Any]:
    """The baseline that always answers the most frequent training object: what a learned prior alone would score."""
    rows = {}
    for name, usable in relations.items():
        token = usable.majority()

        def share(split: Split, usable: UsableRelation = usable, token: int | None = token) -> float | None:
            objects = usable.objects[split]
            return sum(o == token for o in objects) / len(objects) if objects and token is not None else None

        facts = len(usable.facts["test"])
        row = {"type": usable.relation.type, "facts": facts, "epochs": None, "p_at_10": None, "mrr": None}
        rows[name] = row | {"p_at_1": share("test"), "dev_p_at_1": share("dev")}
    return {"relations": rows, **summarize(rows)}


def _describe(data: Data, vocabulary: Vocabulary, relations: Mapping[str, UsableRelation]) -> dict[str, Any]:
    return {
        "name": data.name,
        "vocabulary": {"name": vocabulary.name, "tokens": int(vocabulary.allowed.sum())},
        "relations": {
            name: {
                "label": usable.relation.label,
                "type": usable.relation.type,
                "template": usable.relation.template,
                "facts": {split: len(usable.facts[split]) for split in SPLITS},
                "left_out": usable.left_out,
            }
            for name, usable in relations.items()
        },
    }


def _environment(world: World) -> dict[str, Any]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed")}
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    return {
        "megaprompt": __version__,
        "python": platform.python_version(),
        **packages,
        "world_size": world.size,
        "devices": [f"{world.device.type} ({device})"] * world.size,
        "threads": torch.get_num_threads(),
    }


def _peak_memory(world: World) -> list[int]:
    """Peak resident memory of each rank's process in bytes."""
    peaks = torch.zeros(world.size, dtype=torch.int64)
    peaks[world.rank] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return world.sum_(peaks).tolist()


def _tensorboard(path: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=step)  # events after `step` belong to steps that are taken again


@contextmanager
def _stop_signals() -> Iterator[Any]:
    """SIGINT (Ctrl-C), SIGTERM or SIGUSR1 (a job's time is nearly over) once: stop after the current step, with a
    checkpoint. A second time: at once."""
    asked = False

    def handler(number: int, _: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        logger.warning("stopping after this step (%s); once more to stop at once", signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, handler) for number in _STOP}
    except ValueError:  # not in the main thread, as in a notebook's worker: signals are the caller's business
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, old in before.items():
            signal.signal(number, old)
