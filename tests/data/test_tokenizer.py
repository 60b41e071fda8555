"""Every text comes back from its tokens; what can't be trained is refused with what can."""

import io
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from data.errors import InputError
from data.tokenizer import _CHUNK_CHARACTERS, Tokenizer, train

CODE = [
    "def f(x):\n    if x > 10:\n        return '<s>' + x\n\n\nclass Boat:\n\tdef row(self): return 123456\n",
    "naïve café 船 <0x41> <pad>\0 ▁ ▅\r\n",
] * 50


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train(CODE, 330))


awkward = st.text(st.sampled_from("▁▅\0\ufffd\ufeff \n\t\r<s>/0x41é船😀\u2028\u200b"))


@given(st.one_of(st.text(), awkward))
@example("▁")
@example(" ▁ a ▁▁b")
@example("</s><unk><pad><0x41>")
@example("\0")
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.pad_id, 1, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_long_texts_come_back(tokenizer: Tokenizer) -> None:
    for text in ("船" * (_CHUNK_CHARACTERS + 3), "a\n  " * _CHUNK_CHARACTERS):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.one_of(st.text(), awkward))
def test_incremental_decoding_gives_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    decoder = tokenizer.incremental_decoder()
    shown = ""
    for token in tokenizer.encode(text):
        shown += decoder.add(token)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.finish() == ""


@given(st.lists(st.integers(0, 340)))
def test_incremental_decoding_of_any_tokens_equals_the_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = tokenizer.incremental_decoder()
    parts = b"".join(tokenizer._bytes[i] if i < 330 else b"\xef\xbf\xbd" for i in ids)
    assert "".join(map(decoder.add, ids)) + decoder.finish() == parts.decode("utf-8", "replace")


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("😀")[:-1]) == "\ufffd"


def test_ids_are_those_promised(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 2, 3, 330)
    assert tokenizer.decode([0, 2, *tokenizer.encode("a"), 3]) == "a"


def test_training_is_deterministic_and_silent(capfd: pytest.CaptureFixture[str]) -> None:
    assert train(CODE, 330) == train(iter(CODE), 330)
    assert capfd.readouterr() == ("", "")


def test_the_largest_vocabulary_is_named() -> None:
    with pytest.raises(InputError, match="more than the corpus supports") as caught:
        train(CODE, 50_000)
    largest = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert Tokenizer(train(CODE, largest)).vocab_size == largest
    with pytest.raises(InputError):
        train(CODE, largest + 1)


def test_the_smallest_vocabulary_is_named() -> None:
    with pytest.raises(InputError, match="too small") as caught:
        train(CODE, 100)
    smallest = int(re.search(r"at least (\d+)", str(caught.value))[1])
    assert Tokenizer(train(CODE, smallest)).vocab_size == smallest


@pytest.mark.parametrize("texts", [[], ["", "\0"]])
def test_nothing_to_train_on(texts: list[str]) -> None:
    with pytest.raises(InputError, match="no text"):
        train(texts, 300)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.model").write_bytes(b"garbage")
    with pytest.raises(InputError, match="no sentencepiece model"):
        Tokenizer.load(tmp_path / "no.model")
    with pytest.raises(InputError, match="No such file"):
        Tokenizer.load(tmp_path / "missing.model")


def test_a_model_made_elsewhere_keeps_its_ways() -> None:
    """One with a dummy prefix and without padding, as Llama's is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = Tokenizer(model.getvalue())
    assert ours.encode("def f(x)") == theirs.encode("def f(x)")
    assert ours.decode(ours.encode(" def f(x) é")) == " def f(x) é"
    assert ours.pad_id == theirs.unk_id() and ours.eos_id == theirs.eos_id()
