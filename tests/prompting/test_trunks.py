"""Which text is computed in advance, and how it stands in front of packed rows."""

import torch

from megaprompt.prompting.packing import PassSize, pack, split_into_passes
from megaprompt.prompting.query import Query
from megaprompt.prompting.template import Template
from megaprompt.prompting.trunks import SHORTEST, Trunk, constant_tokens, cut, trunks_of

LONG = tuple(range(100, 100 + 2 * SHORTEST))


def behind(text: tuple[int, ...], *tail: int) -> Query:
    return Query((*text, *tail), (len(text) + len(tail) - 1,))


def test_what_is_constant_ends_at_the_first_pseudo_token_or_target():
    assert constant_tokens(Query((5, 6, -1, 7), (3,))) == 2
    assert constant_tokens(Query((-1, 5, 6), (2,))) == 0
    assert constant_tokens(Query((5, 6, 7), (2,))) == 2
    assert constant_tokens(Query((5, 6, 7, 8), (1, 2), (7, 8))) == 1
    assert constant_tokens(Query((5, 6, -1, 7), (3,), bidirectional=True)) == 0


def test_templates_that_begin_with_a_learned_token_have_nothing_to_keep(make_backbone):
    encoder = make_backbone("llama").text_encoder()
    for text, constant in (("<3>[X]<3>[Y]", False), ("[X] <2>[Y]", True), ("The capital of [X] is [Y]", True)):
        query = Template.parse(text).render({"X": "France"}, encoder)
        assert bool(constant_tokens(query)) == constant


def test_short_texts_are_not_cut():
    queries = [behind(LONG[: SHORTEST - 1], -1, 7), behind((-1, *LONG), 5)]
    assert cut(queries) == queries


def test_a_text_that_recurs_is_cut_where_queries_part():
    """Behind the text that all share, words of two tokens are not worth a trunk, but long ones are."""
    ends = [(1, 2, -1), (1, 3, -1), (*LONG, -1, 4), (*LONG, 5, -1)]
    queries = [behind(LONG, *end) for end in ends]
    common, further = len(LONG), 2 * len(LONG)
    assert [query.cuts for query in cut(queries)] == [(common,), (common,), (common, further), (common, further)]
    assert [query._replace(cuts=()) for query in cut(queries)] == queries
    assert trunks_of(cut(queries)[2]) == [Trunk(LONG, ()), Trunk((*LONG, *LONG), (common,))]
    assert trunks_of(cut(queries)[2])[1].length == len(LONG)
    assert [query.cuts for query in cut(queries[2:])] == [(further,), (further,)]  # nobody parts between


def test_cuts_do_not_depend_on_the_order():
    queries = [behind(LONG[:k] + (9,) * (40 - k), -1) for k in range(0, 32, 3)]
    found = {query.tokens: query.cuts for query in cut(queries)}
    assert any(found.values())
    assert {query.tokens: query.cuts for query in cut(queries[::-1])} == found


def test_what_is_cut_already_stays():
    query = behind(LONG, 5, -1)._replace(cuts=(3,))
    other = behind(LONG, 6, -1)
    assert [one.cuts for one in cut([query, other])] == [(3,), (len(LONG) + 1,)]


def test_asked_once_only_what_several_rows_would_repeat_is_cut():
    few, many = ([behind(LONG, 5 + i, 6) for i in range(count)] for count in (4, 40))
    row = len(LONG) + 30
    assert not any(query.cuts for query in cut(few, row_tokens=row))  # they fit beside it
    assert {query.cuts for query in cut(many, row_tokens=row)} == {(len(LONG),)}
    assert not any(query.cuts for query in cut(many[:1] * 40, row_tokens=8))  # there is nobody to share with


def test_the_budget_goes_to_what_most_queries_share():
    texts = [tuple(range(start, start + SHORTEST)) for start in (100, 200, 300)]
    queries = [behind(text, -1, i) for text, count in zip(texts, (2, 5, 3), strict=True) for i in range(count)]
    cut_of = [query.cuts for query in cut(queries, budget=2 * SHORTEST + 1)]
    assert cut_of == [()] * 2 + [(SHORTEST,)] * 8
    assert [query.cuts for query in cut(queries, budget=SHORTEST - 1)] == [()] * 10
    nested = [behind((*texts[0], *texts[1]), -1), behind((*texts[0], *texts[2]), -1)]
    assert [query.cuts for query in cut(nested, budget=SHORTEST)] == [(SHORTEST,)] * 2


def tree() -> list[Query]:
    """Queries behind nested and several trunks, with common tails, and some without."""
    texts = [LONG, (*LONG, *LONG[::-1]), LONG[::-1], ()]
    return cut([behind(text, -1, *tail) for text in texts for tail in ((1,), (1, 2), (1, 3), (2, 2, 2), (4, 1))])


def test_a_node_sees_its_trunks_its_ancestors_and_itself():
    for row_tokens in (5, 16, 40, 500):
        batch = pack(tree(), row_tokens)
        mask = batch.attention_mask()[:, 0]
        rows, width, keys = mask.shape
        known = [sum(trunk.length for trunk in row) for row in batch.trunks]
        assert (rows, width) == batch.token_ids.shape
        assert keys == max(known) + width
        assert torch.equal(mask.sum(-1), batch.position_ids + 1)
        assert not mask[:, :, max(known) :].triu(1).any()
        for row, length in enumerate(known):
            assert not mask[row, :, length : max(known)].any()  # padding


def test_each_row_has_each_trunk_once_and_no_more_than_it_may():
    queries = tree()
    batch = pack(queries, 2 * len(LONG))
    assert batch.token_ids.numel() < sum(len(query.tokens) - (query.cuts or (0,))[-1] for query in queries)
    for row in batch.trunks:
        assert len(row) == len(set(row))
        assert sum(trunk.length for trunk in row) <= 2 * len(LONG)
    assert {trunk for row in batch.trunks for trunk in row} == {t for query in queries for t in trunks_of(query)}
    assert [len(row) for row in pack(queries, 500).trunks] == [3]


def test_short_tails_fill_a_pass():
    """Each behind a trunk of its own: rows are full of them before there is much to compute."""
    queries = cut([behind(tuple(range(100 * i, 100 * i + 60)), -1, 7) for i in range(1, 200)])
    size = PassSize(64, 256)
    passes = split_into_passes([(query,) for query in queries], size)
    assert sorted(i for part in passes for i in part) == list(range(len(queries)))
    assert [len(part) for part in passes[:-1]] == [32] * (len(passes) - 1)  # rows of 2 + 60/10 places
    assert pack([queries[i] for i in passes[0]], 64).token_ids.shape == (32, 2)
