import pytest

from megaprompt.errors import UsageError
from megaprompt.prompting.template import Template, TextEncoder


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
