import pytest

from megaprompt.errors import MegapromptError, UsageError
from megaprompt.prompting.query import TextEncoder
from megaprompt.prompting.template import Template, default_template, pseudo_likelihood


def spell(text: str, is_start: bool) -> list[int]:
    """Encodes words as 100 + length, and marks a text that follows something with a leading 0."""
    return [100 + len(word) for word in text.split()] if is_start else [0, *(100 + len(word) for word in text.split())]


ENCODER = TextEncoder(spell)


def test_the_papers_template():
    template = Template.parse("<3>[X]<3>[Y]")
    assert template.num_pseudo_tokens == 6
    query = template.render({"X": "New Zealand"}, ENCODER)
    assert query.tokens == (-1, -2, -3, 0, 103, 107, -4, -5, -6)
    assert query.targets == (8,)


def test_anchor_words_join_the_subject():
    query = Template.parse("<1> capital [X] <2> is [Y] .").render({"X": "Peru"}, ENCODER)
    assert query.tokens == (-1, 0, 107, 104, -2, -3, 0, 102)


def test_manual_prompt_starts_the_text_and_ends_before_the_object():
    query = Template.parse("The capital of [X] is [Y] .").render({"X": "Peru"}, ENCODER)
    assert query.tokens == (103, 107, 102, 104, 102)
    assert query.targets == (4,)


def test_text_that_touches_a_placeholder_goes_on_with_the_word():
    written = []

    def note(text: str, is_start: bool) -> list[int]:
        written.append((text, is_start))
        return [len(written)]

    masked = TextEncoder(note, mask=0)
    assert Template.parse("[X]'s capital <1>city [Y]. It").render({"X": "Peru"}, masked).tokens == (1, -1, 2, 0, 3)
    assert written == [("Peru's capital", True), (" city", False), (". It", False)]
    written.clear()
    Template.parse("[Y] [X]'s").render({"X": "Peru"}, masked)
    Template.parse("[Y][X]").render({"X": "Peru"}, masked)
    assert written == [(" Peru's", False), ("Peru", False)]
    written.clear()
    template, tokens = Template.parse("In [X]'s city [Y].").with_pseudo_tokens(masked)
    assert (template.text, tokens) == ("<1>[X]<1>[Y]<1>", [1, 2, 3])
    assert written == [("In", True), ("'s city", False), (".", False)]


def test_beginning_of_text_token():
    query = Template.parse("[X]<1>[Y]").render({"X": "Peru"}, TextEncoder(spell, (7,)))
    assert query.tokens == (7, 104, -1)


@pytest.mark.parametrize("text", ["<3>[X]<3>", "<3>[Y]", "[X][X][Y]", "no placeholders"])
def test_placeholders_must_occur_once(text):
    with pytest.raises(UsageError, match="exactly one"):
        Template.parse(text)


def test_subject_after_object_is_refused():
    with pytest.raises(UsageError, match="after"):
        Template.parse("[Y] is the capital of [X] .").render({"X": "Peru"}, ENCODER)


def test_real_tokenizer_starts_words_with_a_space(make_backbone):
    backbone = make_backbone()
    encoder = backbone.text_encoder()
    tokens = Template.parse("<1>[X]<1>[Y]").render({"X": "South Korea"}, encoder).tokens
    assert backbone.tokenization.tokenizer.decode(tokens[1:-1]) == " South Korea"
    tokens = Template.parse("[X] is in [Y] .").render({"X": "South Korea"}, encoder).tokens
    assert backbone.tokenization.tokenizer.decode(tokens) == "South Korea is in"


# ---------------------------------------------------------------------------------------- other fields, given answers

NLI = ("premise", "hypothesis")
EXAMPLE = {"premise": "one three seven", "hypothesis": "is it"}


def test_fields_have_names_and_other_brackets_are_text():
    template = Template.parse("[premise] [sic] <1> [hypothesis] ? <2>[Y]", NLI)
    assert template.num_pseudo_tokens == 3
    query = template.render(EXAMPLE, ENCODER)
    assert query.tokens == (103, 105, 105, 105, -1, 0, 102, 102, 101, -2, -3)
    assert default_template(True, ["[premise]", "[hypothesis]"]) == "<3>[premise]<3>[hypothesis]<3>[Y]"
    for wrong in ("[premise][premise] [Y]", "[premise]", "<3>[X][Y]"):
        with pytest.raises(UsageError, match=r"needs exactly one each of \[premise\], \[hypothesis\] and one \[Y\]"):
            Template.parse(wrong, NLI)


@pytest.mark.parametrize(
    ("fits", "kept"),
    [(8, ("one three seven", "is it")), (7, ("one three seven", "is")), (5, ("one three", "")), (3, ("", ""))],
)
def test_fields_that_may_be_cut_are_cut_to_fit_the_last_first(fits, kept):
    template = Template.parse("[premise...] and [hypothesis...] so <1>[Y]", NLI)
    query = template.render(EXAMPLE, ENCODER, max_tokens=fits)
    assert query == template.render(dict(zip(NLI, kept, strict=True)), ENCODER)
    assert len(query.tokens) <= fits


def test_what_cannot_be_cut_enough_is_told():
    template = Template.parse("[premise] and [hypothesis] so <1>[Y]", NLI)
    with pytest.raises(UsageError, match=r"8 tokens are left where 4 fit; mark fields that may be cut"):
        template.render(EXAMPLE, ENCODER, max_tokens=4)
    with pytest.raises(UsageError, match=r"3 tokens are left where 2 fit$"):
        Template.parse("[premise...] so <1>[Y]", NLI).render(EXAMPLE, TextEncoder(spell, (7,)), max_tokens=2)


def test_a_given_answer_is_read_with_the_words_behind_it():
    template = Template.parse("The capital of [X] is <1>[Y] in <1> fact.")
    query = template.render({"X": "Peru"}, TextEncoder(spell, (7,)), answer="Lima city")
    assert query.tokens == (7, 103, 107, 102, 104, 102, -1, 0, 104, 104, 102, -2, 0)  # the last one, 105, is not read
    assert query.labels == (0, 104, 104, 102, 0, 105)  # not the pseudo token
    assert query.targets == (6, 7, 8, 9, 11, 12)  # each where the label comes next
    first = Template.parse("[Y] is the capital of [X]").render({"X": "Peru"}, TextEncoder(spell, (7,)), answer="Lima")
    assert (first.targets[0], first.labels[0]) == (0, 104)
    with pytest.raises(UsageError, match="nothing stands before the answer"):
        Template.parse("[Y] is the capital of [X]").render({"X": "Peru"}, ENCODER, answer="Lima")


def test_a_masked_model_has_a_mask_for_each_token_of_a_given_answer():
    masked = TextEncoder(lambda text, _: [100 + len(word) for word in text.split()], (2,), mask=4, suffix=(3,))
    query = Template.parse("[X] has <1>[Y] .").render({"X": "Peru"}, masked, answer="Lima city")
    assert query.tokens == (2, 104, 103, -1, 4, 4, 101, 3)
    assert (query.targets, query.labels, query.bidirectional) == ((4, 5), (104, 104), True)


def test_a_sentence_has_the_tokens_that_it_has_in_any_text(make_backbone):
    """They may join the answer to what stands around it; then the whole token is part of the answer."""

    def pairs(text: str, is_start: bool) -> list[int]:
        return [1000 * ord(text[i]) + ord(text[i + 1 : i + 2] or " ") for i in range(0, len(text), 2)]

    query = Template.parse("[X] [Y]!?").render({"X": "ab"}, TextEncoder(pairs, (7,)), answer="c")
    assert query.tokens == (7, *pairs("ab c!?", True)[:-1])
    assert query.labels == tuple(pairs(" c!?", False))
    query = Template.parse("[X]'[Y]").render({"X": "ab"}, TextEncoder(pairs, (7,)), answer="cd")
    assert query.labels == tuple(pairs("'cd", False))
    written = []
    note = TextEncoder(lambda text, is_start: [written.append(text), len(text)][1:], (7,))
    Template.parse("[X][Y]").render({"X": "Peru"}, note, answer="Lima")
    Template.parse("<1>[X]<1>([Y])").render({"X": "Peru"}, note, answer="Lima")
    assert [text for text in written if "Lima" in text] == ["Peru Lima", "Peru Lima", " (Lima)", " (Lima"]


def test_pseudo_likelihood_masks_the_rest_of_a_word(make_backbone):
    """Words of three letters a token; `in` and the answer are of two tokens and more."""

    def spell3(text: str, is_start: bool) -> list[int]:
        return [ord(word[i]) for word in text.split() for i in range(0, len(word), 3)]

    def words(text: str, is_start: bool) -> list[int]:
        return [n for n, word in enumerate(text.split()) for _ in range(0, len(word), 3)]

    encoder = TextEncoder(spell3, (2,), mask=0, suffix=(3,), words=words)
    template = Template.parse("[X] has <1>[Y] too")
    queries = pseudo_likelihood(template, {"X": "Peru"}, encoder, answer="Lima city")
    P, u, h, L, a, c, y, t = map(ord, "PuhLacyt")
    assert [query.tokens for query in queries] == [
        (2, 0, 0, h, -1, L, a, c, y, t, 3),
        (2, P, 0, h, -1, L, a, c, y, t, 3),
        (2, P, u, 0, -1, L, a, c, y, t, 3),
        (2, P, u, h, -1, 0, 0, c, y, t, 3),
        (2, P, u, h, -1, L, 0, c, y, t, 3),
        (2, P, u, h, -1, L, a, 0, 0, t, 3),
        (2, P, u, h, -1, L, a, c, 0, t, 3),
        (2, P, u, h, -1, L, a, c, y, 0, 3),
    ]
    assert [query.targets for query in queries] == [(1,), (2,), (3,), (5,), (6,), (7,), (8,), (9,)]
    assert [query.labels[0] for query in queries] == [P, u, h, L, a, c, y, t]
    assert all(query.bidirectional for query in queries)
    only = pseudo_likelihood(template, {"X": "Peru"}, encoder, answer="Lima city", answer_only=True)
    assert list(only) == list(queries[3:7])
    behind = pseudo_likelihood(template, {"X": "Peru"}, encoder, answer="Lima city", before="Cuba has Rome.\n")
    assert [query.labels for query in behind] == [query.labels for query in queries]
    with pytest.raises(MegapromptError, match="does not tell where words are"):
        pseudo_likelihood(template, {"X": "Peru"}, encoder._replace(words=None), answer="Lima")


def test_demonstrations_stand_in_front_on_lines_of_their_own(make_backbone):
    backbone = make_backbone()
    encoder = backbone.text_encoder()
    before = "The capital of Peru is Lima.\n"
    query = Template.parse("The capital of [X] is [Y].").render({"X": "Cuba"}, encoder, before=before)
    assert backbone.tokenization.tokenizer.decode(query.tokens) == f"{before}The capital of Cuba is"
    query = Template.parse("<1>[X]<1>[Y]").render({"X": "Cuba"}, encoder, before=before)
    assert backbone.tokenization.tokenizer.decode(query.tokens[:-3]).startswith(before)
    assert query.tokens[-1] == -2


def test_a_field_without_the_punctuation_at_its_end():
    written = []
    encoder = TextEncoder(lambda text, is_start: written.append(text) or [1])
    fields = {"premise": 'It ran. "So!"', "hypothesis": "It sat."}
    template = Template.parse("[premise~...]? [hypothesis~] , [Y]", NLI)
    assert [str(piece) for piece in template.pieces] == ["[premise~...]", "? ", "[hypothesis~]", " , ", "[Y]"]
    template.render(fields, encoder)
    assert written == ['It ran. "So? It sat ,']
    assert template.fill(fields, "Yes") == 'It ran. "So? It sat , Yes'
    assert Template.parse("[premise] [Y]", NLI).fill(fields, "Yes") == 'It ran. "So!" Yes'
