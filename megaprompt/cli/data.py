"""The commands below `megaprompt data`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cyclopts import App

from megaprompt.config import CountConfig, FetchConfig, VocabularyConfig
from megaprompt.config.options import READING
from megaprompt.console import show

data = App(
    name="data",
    help="Fetch published facts, make a vocabulary that several models share, count facts.",
    default_parameter=READING["default_parameter"],
)


@data.command
def fetch(config: FetchConfig) -> None:
    """Download published facts or examples into a directory for --data. Called again, it goes on where it stopped."""
    from megaprompt.tasks.fetch import SOURCES, fetch, fetch_from_hub
    from megaprompt.tasks.releases import RELEASES, fetch_release

    out = config.out or Path("data") / config.source
    if config.source in RELEASES:
        release = RELEASES[config.source]
        if config.url is not None:
            release = dataclasses.replace(release, url=config.url)
        print(f"{out} has {fetch_release(release, out)}")
        print(f"megaprompt {release.use} --data {out} ...")
        return
    source = SOURCES[config.source]
    if config.url is not None:
        source = source._replace(url=config.url, relations_url=None)
    fetched = fetch(source, out) if config.hub is None else fetch_from_hub(config.hub, out)
    facts = ", ".join(f"{count} {split}" for split, count in fetched.facts.items())
    print(f"{out} has {fetched.relations} relations: {facts} facts")
    if fetched.templates < fetched.relations:
        print(f"{fetched.relations - fetched.templates} of the relations have no manual prompt: add to relations.jsonl")
    vocab = f" --vocab {out / fetched.vocabularies[0]}" if fetched.vocabularies else ""
    methods = "" if fetched.facts["train"] else " --methods manual"
    print(f"megaprompt probe --data {out}{vocab}{methods} ...")


@data.command
def vocabulary(config: VocabularyConfig) -> None:
    """Write the words that are one token for every one of several models: a file for --vocab."""
    from megaprompt.backbone import load_tokenizer
    from megaprompt.files import write_file
    from megaprompt.tasks.lama.facts import read_vocabulary
    from megaprompt.tasks.lama.vocabulary import common_words

    candidates = None if config.words is None else read_vocabulary(config.words)
    words = common_words([load_tokenizer(name) for name in config.backbones], candidates)
    write_file(config.out, "".join(f"{word}\n" for word in words).encode())
    print(f"{config.out} has {len(words)} words that are one token of {', '.join(config.backbones)}")


@data.command
def count(config: CountConfig = CountConfig()) -> None:  # noqa: B008 (frozen)
    """Count the facts whose object is one token of a model and in a vocabulary, by relation and split."""
    from megaprompt.backbone import load_tokenizer
    from megaprompt.tasks.lama.facts import load_data
    from megaprompt.tasks.lama.vocabulary import beside_lama, count_facts, count_table

    facts = load_data(config.data)
    counts = count_facts(facts, config.vocab, load_tokenizer(config.backbone))
    show(count_table(counts, f"facts of {facts.name} for {config.backbone}, --vocab {config.vocab}"))
    if published := beside_lama(counts):
        print(published)
