"""Packed passes equal plain ones: each query alone, unpadded, through the model as transformers runs it."""

import random

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GPT2Config, MambaConfig

from megaprompt.backbone import Backbone
from megaprompt.errors import MegapromptError
from megaprompt.prompting.packing import PassSize, pack, split_into_passes
from megaprompt.prompting.prompt_encoder import PromptEncoder
from megaprompt.prompting.query import Query
from megaprompt.prompting.rows import Order, end_of
from megaprompt.prompting.template import Template
from megaprompt.prompting.trunks import cut
from tests.conftest import PAIRS, plain_logits

WORDS = range(20, 30)


def random_queries(seed: int, count: int, pseudo: int = 6, relations: int = 2) -> list[Query]:
    """Queries that share prefixes, repeat, contain each other, and have targets before their end."""
    rng = random.Random(seed)
    queries = []
    for _ in range(count):
        first = -1 - pseudo * rng.randrange(relations)
        subject = [rng.choice(WORDS) for _ in range(rng.choice((1, 1, 2, 3, 7)))]
        tokens = [first - k for k in range(3)] + subject + [first - 3 - k for k in range(rng.choice((2, 3)))]
        target = len(tokens) - 1 if rng.random() < 0.8 else rng.randrange(3, len(tokens))
        queries.append(Query(tuple(tokens), (target,)))
    queries.append(Query((21, 22, 23), (2,)))  # a manual prompt among them
    return queries


@pytest.mark.parametrize("behind_trunks", [False, True])
@pytest.mark.parametrize("width", [1, 9, 30, 500])
def test_rows_have_the_sizes_that_were_told(width, behind_trunks):
    """Of all queries, and of some of them, by what is known of all."""
    queries = random_queries(1, 60)
    if behind_trunks:
        texts = [tuple(range(30, 30 + length)) for length in (16, 33, 47)]
        longer = [Query(texts[i % 3] + q.tokens, (len(texts[i % 3]) + q.targets[0],)) for i, q in enumerate(queries)]
        queries = cut(longer)
        assert all(query.cuts for query in queries)
    order = Order(sorted(queries, key=lambda query: query.tokens))
    longest = max(len(query.tokens) - end_of(query.cuts) for query in queries)
    places = sorted(random.Random(width).sample(range(len(queries)), 20))
    for some in (order, order.some(places)):
        rows = some.rows(range(len(some.queries)), width, 50)
        assert some.sizes(width, 50) == [(len(row.tokens), row.known) for row in rows]
        assert [number for row in rows for number, _ in row.ends] == list(range(len(some.queries)))
        assert all(len(row.tokens) <= max(width, longest) for row in rows)
    assert order.some(places).sizes(width, 50) == Order([order.queries[i] for i in places]).sizes(width, 50)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("row_tokens", [1, 24, 64, 1000])
def test_loss_and_encoder_gradients_equal_the_plain_forward(make_backbone, kind, row_tokens):
    backbone = make_backbone(kind)
    torch.manual_seed(1)
    encoder = PromptEncoder(12, backbone.hidden_size).double()
    queries = random_queries(0, 40)
    gold = torch.randint(0, backbone.vocabulary_size, (len(queries),))

    def loss_and_gradients(logits_of):
        encoder.zero_grad()
        loss = cross_entropy(logits_of(encoder()), gold)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in encoder.parameters()]

    def packed(prompts):
        batch = pack(queries, row_tokens)
        return backbone(batch, prompts)[batch.target_of_query]

    loss, gradients = loss_and_gradients(packed)
    expected_loss, expected = loss_and_gradients(lambda prompts: plain_logits(backbone, queries, prompts))
    assert abs(loss - expected_loss) < 1e-10 * expected_loss
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient - wanted).norm() < 1e-10 * wanted.norm()


def test_shared_prefixes_are_computed_once():
    queries = [Query((-1, -2, *subject, -3), (len(subject) + 2,)) for subject in ((5,), (5, 6), (7,), (5,))]
    batch = pack(queries, row_tokens=64)
    assert batch.token_ids.shape == (1, 8)  # -1 -2 5 -3 | 6 -3 | 7 -3
    assert batch.targets.numel() == 3
    assert batch.target_of_query[0] == batch.target_of_query[3]
    assert sorted(batch.position_ids[0].tolist()) == [0, 1, 2, 2, 3, 3, 3, 4]


def test_mask_is_the_ancestor_relation():
    queries = random_queries(3, 30)
    batch = pack(queries, row_tokens=48)
    mask = batch.attention_mask()
    assert torch.equal(mask.sum(-1)[:, 0], batch.position_ids + 1), "a node sees its ancestors and itself"
    assert not mask.triu(1).any(), "no node sees a later one"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_mask_that_is_added_is_the_same_and_aligned(dtype):
    batch = pack(random_queries(3, 30), row_tokens=43)
    mask, added = batch.attention_mask(), batch.added_mask(dtype)
    assert added.shape == mask.shape
    assert torch.equal(added == 0, mask)
    assert (added[~mask] == torch.finfo(dtype).min).all()
    assert added.stride(-1) == 1
    assert not any(stride % 16 for stride in added.stride()[:-1])


def test_rows_are_within_the_limit_and_even():
    queries = random_queries(4, 200)
    batch = pack(queries, row_tokens=64)
    assert batch.token_ids.shape[1] <= 64
    length = (batch.visible_until > torch.arange(batch.token_ids.shape[1]) + 1).sum(1)
    assert length.min() > 0.5 * length.max()


def test_passes_cover_every_query_once_within_the_limit():
    queries = random_queries(5, 300)
    passes = split_into_passes([(query,) for query in queries], PassSize(32, 96))
    assert sorted(i for indices in passes for i in indices) == list(range(len(queries)))
    for indices in passes:
        assert pack([queries[i] for i in indices], 32).token_ids.numel() <= 96


def test_a_small_pass_has_narrow_rows():
    """--pass-tokens below --row-tokens: the pass is the limit, which is what the plan advises to lower."""
    queries = random_queries(5, 300)
    size = PassSize(256, 96)
    assert size == PassSize(96, 96)
    for indices in split_into_passes([(query,) for query in queries], size):
        assert pack([queries[i] for i in indices], size.row_tokens).token_ids.numel() <= 96
    assert PassSize(64, 96).row_tokens == 64
    assert PassSize(None, 96).row_tokens is None


def test_a_query_longer_than_a_row_has_its_own(make_backbone):
    queries = [Query(tuple(range(20, 60)), (39,)), Query((20, 21), (1,))]
    batch = pack(queries, row_tokens=8)
    assert batch.token_ids.shape[1] == 40


def test_empty_batch_is_a_valid_pass(make_backbone):
    backbone = make_backbone()
    prompts = torch.zeros(6, backbone.hidden_size, dtype=torch.float64, requires_grad=True)
    assert split_into_passes([], PassSize(32, 96)) == []
    logits = backbone(pack([], 32), prompts)
    assert logits.shape == (0, backbone.vocabulary_size)


def test_model_head_sees_targets_only(make_backbone):
    backbone = make_backbone()
    shapes = []
    backbone.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    batch = pack([Query((21, 22, 23), (2,)), Query((21, 24), (1,))], 64)
    backbone(batch)
    assert shapes == [(2, backbone.hidden_size)]


def test_a_row_for_each_query():
    queries = [Query((5, -1, 7), (2,)), Query((5, -1), (1,)), Query((5, -1, 7), (2,)), Query((6, 7, 8, 9), (3,))]
    batch = pack(queries, None)
    assert batch.token_ids.tolist() == [[5, 0, 0, 0], [5, 0, 7, 0], [6, 7, 8, 9]]
    assert batch.padding_mask().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.targets[batch.target_of_query].tolist() == [6, 1, 6, 11]
    assert batch.pseudo_positions.tolist() == [1, 5]
    assert pack([], None).padding_mask().shape == (1, 1)
    passes = split_into_passes([(query,) for query in queries], PassSize(None, 8))
    assert passes == [[1, 0], [2, 3]]
    assert sorted(
        i for part in split_into_passes([(query,) for query in queries], PassSize(None, 1)) for i in part
    ) == [0, 1, 2, 3]


CAUSAL = {
    "gpt2": (GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=64), 64),
    "gemma2": (
        Gemma2Config(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=32,
            intermediate_size=64, attn_logit_softcapping=5.0,
        ),
        64,
    ),
    "bloom": (BloomConfig(n_layer=2, n_head=4, hidden_size=32), None),  # ALiBi
    "mamba": (MambaConfig(num_hidden_layers=2, hidden_size=32), None),  # recurrent
}  # fmt: skip


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_kind_of_causal_model_is_computed_exactly(tokenizer, kind):
    """Packed where that is exact, else one by one; against transformers' own forward, in double precision."""
    config, row_tokens = CAUSAL[kind]
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    backbone = Backbone(AutoModelForCausalLM.from_config(config).double(), tokenizer, kind)
    size = backbone.exact_size(PassSize(64, 64))
    assert size == PassSize(row_tokens, 64)
    template, encoder = Template.parse("<2>[X] is<1>[Y]"), backbone.text_encoder()
    queries = [template.render({"X": subject}, encoder) for subject, _ in PAIRS["P36"]]
    prompts = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    found = [torch.zeros(0)] * len(queries)
    for part in split_into_passes([(query,) for query in queries], size):
        batch = pack([queries[i] for i in part], size.row_tokens)
        for i, row in zip(part, backbone(batch, prompts)[batch.target_of_query], strict=True):
            found[i] = row
    plain = plain_logits(backbone, queries, prompts)
    logits, weights = torch.stack(found), torch.randn_like(plain)
    gradients = [torch.autograd.grad((x * weights).sum(), prompts)[0] for x in (logits, plain)]
    # Some round to single precision inside: norms, scores, ALiBi's slopes.
    tolerance = 1e-10 if kind == "gpt2" else 1e-5
    torch.testing.assert_close(logits, plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_a_model_that_ignores_the_mask_gets_rows_of_one_query(make_backbone, caplog):
    backbone = make_backbone("gpt2")
    assert backbone.exact_size(PassSize()) == PassSize()
    assert not [record for record in caplog.records if record.name.startswith("megaprompt")]
    forward = backbone.model.forward

    def without_mask(**inputs):
        return forward(**{**inputs, "attention_mask": None})

    backbone.model.forward = without_mask
    assert backbone.exact_size(PassSize()) == PassSize(None)
    assert "gpt2 (gpt2) does not compute packed queries exactly (relative error" in caplog.text


def test_a_model_that_cannot_be_given_vectors_is_refused(make_backbone):
    backbone = make_backbone("gpt2")
    forward = backbone.model.forward
    backbone.model.forward = lambda input_ids: forward(input_ids)
    with pytest.raises(
        MegapromptError, match=r"backbone gpt2 \(gpt2\) does not compute queries exactly .*inputs_embeds"
    ):
        backbone.exact_size(PassSize())
