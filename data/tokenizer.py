"""The tokenizer: sentencepiece, set up so that every text comes back from its tokens character for character."""

import codecs
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from data.errors import InputError

_SPACE = "▁"
"""What sentencepiece writes for a space, U+2581."""
_DAMAGING = {0: None, ord(_SPACE): None, ord("▅"): None}
"""Characters for which sentencepiece's training leaves out the whole text around them."""
_REPLACEMENT = "\ufffd".encode()
_TRAINING_CHARACTERS = 2_000
_CHUNK_CHARACTERS = 1 << 16


def train(texts: Iterable[str], vocab_size: int, model_type: Literal["bpe", "unigram"] = "bpe") -> bytes:
    """Train a tokenizer. The same texts give the same bytes.

    Token ids: 0 pad, 1 unknown (never produced), 2 beginning of a document, 3 its end, then the 256 bytes.

    Raises:
        InputError: there is no text, or it can't fill the vocabulary or needs a larger one.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_pieces(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _TRAINING_CHARACTERS,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(str(error), vocab_size) from error
    return model.getvalue()


def _explained(message: str, vocab_size: int) -> InputError | RuntimeError:
    if largest := re.search(r"value <= (\d+)", message):
        return InputError(
            f"a vocabulary of {vocab_size} is more than the corpus supports: set --vocab-size to at most "
            f"{largest[1]}, or give more text"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return InputError(
            f"a vocabulary of {vocab_size} is too small for the corpus's characters: set --vocab-size "
            f"to at least {smallest[1]}"
        )
    if "sentences_.empty()" in message:
        return InputError("the corpus holds no text to train a tokenizer on: give other sources")
    return RuntimeError(message)


def _training_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Short runs of whole lines: sentencepiece leaves out what is too long, and counts repeats."""
    for text in texts:
        yield from _chunks(text.translate(_DAMAGING), _TRAINING_CHARACTERS)


def _chunks(text: str, limit: int) -> Iterator[str]:
    """Cut a text into at most `limit` characters each, after a newline where there is one."""
    start = 0
    while start < len(text):
        stop = start + limit
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


class Tokenizer:
    """Text to token ids and back: `decode(encode(text)) == text` for every text, if `trireme prepare` trained it.

    A model from elsewhere (`add_dummy_prefix`, a normalization) encodes as it was made to.
    """

    def __init__(self, model: bytes, name: str = "the tokenizer") -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"{name} is no sentencepiece model: give a .model that sentencepiece trained"
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.pad_id: int = self._padding(name)
        self._bytes = [self._piece_bytes(token) for token in range(self.vocab_size)]
        first = self._model.encode("a")[:1]
        self._adds_space = bool(first) and self._bytes[first[0]].startswith(b" ")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a .model file: plain data, of which nothing is executed. Raises InputError."""
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path} can't be read: {error.strerror}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids, without beginning or end of document."""
        if self._adds_space:
            return self._model.encode(text)
        ids: list[int] = []
        for chunk in _chunks(text, _CHUNK_CHARACTERS):
            # sentencepiece would take a literal U+2581 for a space
            for i, part in enumerate(chunk.split(_SPACE)):
                if i:
                    ids += self._space_symbol
                ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text. Beginning, end and padding become nothing.

        Bytes that are no UTF-8, and tokens past `vocab_size` (a model's vocabulary may be padded), become U+FFFD.
        """
        decoder = self.incremental_decoder()
        return "".join([decoder.add(token) for token in ids]) + decoder.finish()

    def incremental_decoder(self) -> "IncrementalDecoder":
        """A decoder to which tokens are given one by one."""
        return IncrementalDecoder(self._bytes, self._adds_space)

    @property
    def _space_symbol(self) -> list[int]:
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def _padding(self, name: str) -> int:
        if self.eos_id < 0:
            raise InputError(f"{name} has no end-of-document token: train one without --tokenizer")
        if self._model.pad_id() >= 0:
            return self._model.pad_id()
        if self._model.is_byte(self._model.piece_to_id("<0x00>")):
            return self._model.unk_id()  # text never needs it: what has no token is written in bytes
        raise InputError(
            f"{name} has neither a padding token nor byte fallback: train one without --tokenizer"
        )

    def _piece_bytes(self, token: int) -> bytes:
        piece = self._model.id_to_piece(token)
        if self._model.is_control(token):
            return b""
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(token):
            return _REPLACEMENT
        return piece.replace(_SPACE, " ").encode()


class IncrementalDecoder:
    """Text as its tokens come; what is returned, put together, equals the decoding of the whole."""

    def __init__(self, pieces: list[bytes], drop_first_space: bool) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop = drop_first_space

    def add(self, token: int) -> str:
        """The text that is certain after this token: empty inside a character of several bytes."""
        piece = self._pieces[token] if token < len(self._pieces) else _REPLACEMENT
        if self._drop and piece:
            piece, self._drop = piece.removeprefix(b" "), False
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left of a character that was never completed."""
        return self._decoder.decode(b"", final=True)
