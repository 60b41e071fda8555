"""Pairs of texts: what is read is what was written, cut and padded, each pair once and each source in one split."""

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig
from data.dataset import PairsInfo, open_dataset
from data.docstrings import documented_functions
from data.errors import InputError
from data.pairs import read_pairs
from data.prepare_pairs import prepare_pairs
from data.stream import TrainingStream, validation_batches
from data.tokenizer import Tokenizer
from tests.data.test_prepare import tree

COLUMNS = ("source", "source_padding", "tokens")
OPTIONS = {"vocab_size": 300, "source_len": 24, "seq_len": 8, "validation_fraction": 0.3}


def write(path: Path, pairs: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"source": a, "target": b, "id": 0}) + "\n" for a, b in pairs))
    return str(path)


PAIRS = [(f"oars of the {number} ships", f"ship {number % 7}") for number in range(80)]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """80 pairs, of which 20 come twice, one whose source has another target, a long one, and half-empty ones."""
    odd = [("oars of the 3 ships", "another"), ("row " * 40, "sink " * 20), ("", "nothing"), ("silence", "")]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS + PAIRS[:20] + odd)


@pytest.fixture(scope="module")
def made(jsonl: str, tmp_path_factory: pytest.TempPathFactory) -> PairsInfo:
    return prepare_pairs([jsonl], tmp_path_factory.mktemp("made") / "set", **OPTIONS)


def texts(info: PairsInfo) -> list[tuple[str, str]]:
    """Both splits' pairs as they are read, the training split first; checks padding on the way."""
    tokenizer = Tokenizer.load(info.tokenizer_path)
    config = DataConfig(path=str(info.path), global_batch_size=1, micro_batch_size=1, num_workers=0)
    stream = TrainingStream(config, 0, 0, 1, COLUMNS)
    batches = [next(stream) for _ in range(info.train.sequences)]
    stream.close()
    batches += validation_batches(str(info.path), 1, 0, 1, inputs=COLUMNS)
    found = []
    for batch in batches:
        source, padding, tokens = (batch.inputs[name][0] for name in COLUMNS)
        targets = batch.targets[0]
        assert (source.shape, tokens.shape, targets.shape) == ((24,), (8,), (8,))
        scored = targets != -100
        assert tokens[0] == info.pad_id and (tokens[1:][scored[:-1]] == targets[:-1][scored[:-1]]).all()
        assert ((source == info.pad_id) == padding).all() and source[~padding][-1] == info.eos_id
        kept = targets[scored].tolist()
        assert kept[-1] == info.eos_id or len(kept) == 8
        found.append((tokenizer.decode(source.tolist()), tokenizer.decode(kept)))
    return found


def test_what_is_read_is_what_was_given(made: PairsInfo) -> None:
    assert open_dataset(made.path) == made
    found = texts(made)
    cut = [pair for pair in found if pair[0].startswith("row")]
    assert len(cut) == 1 and ("row " * 40).startswith(cut[0][0]) and ("sink " * 20).startswith(cut[0][1])
    assert sorted({*found} - {*cut}) == sorted({*PAIRS, ("oars of the 3 ships", "another")})
    assert len(found) == 82, "each once"


def test_splits_share_no_source_and_their_counts_are_right(made: PairsInfo) -> None:
    found = texts(made)
    train, validation = found[: made.train.sequences], found[made.train.sequences :]
    assert not {source for source, _ in train} & {source for source, _ in validation}
    assert (made.train.documents, made.validation.documents) == (len(train), len(validation))
    assert 0.1 < len(validation) / len(found) < 0.5
    scored = sum(int((b.targets != -100).sum()) for b in validation_batches(str(made.path), 4, 0, 1))
    assert made.validation.tokens == scored


def test_a_batch_filled_up_has_nothing_to_score(made: PairsInfo) -> None:
    size = made.validation.sequences + 3
    (batch,) = validation_batches(str(made.path), size, 0, 1, inputs=COLUMNS)
    assert batch.sample_ids[-3:].tolist() == [-1, -1, -1]
    assert (batch.targets[-3:] == -100).all() and batch.inputs["source_padding"][-3:].all()


def test_the_same_input_gives_the_same_bytes(made: PairsInfo, jsonl: str, tmp_path: Path) -> None:
    again = prepare_pairs([jsonl], tmp_path / "again", **OPTIONS)
    assert again.digest == made.digest and tree(again.path) == tree(made.path)
    given = prepare_pairs([jsonl], tmp_path / "given", tokenizer=made.tokenizer_path, **OPTIONS)
    assert given.digest == made.digest


def test_mistakes_are_told_in_one_line_and_leave_nothing(made: PairsInfo, jsonl: str, tmp_path: Path) -> None:
    plain, broken = tmp_path / "plain.txt", tmp_path / "broken.jsonl"
    plain.write_text("text")
    broken.write_text('{"source": "a", "target": "b"}\n{"source": "a"}\n')
    one = write(tmp_path / "one.jsonl", PAIRS[:1])

    def fails(message: str, source: str, **options: float) -> None:
        with pytest.raises(InputError, match=message) as caught:
            prepare_pairs([source], tmp_path / "out", **OPTIONS | options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("out*"))

    fails("plain.txt holds no pairs: give .jsonl files", str(plain))
    fails("line 2 has no text in field `target`", str(broken))
    fails("doesn't exist", str(tmp_path / "missing"))
    fails("--source-len 0: give a positive", jsonl, source_len=0)
    fails("none of 82 pairs falls into the validation split", jsonl, validation_fraction=0.0)
    fails("set --vocab-size to at most", one)
    with pytest.raises(InputError, match="exists: choose another --out"):
        prepare_pairs([jsonl], made.path, **OPTIONS)


CODE = '''
import never_imported

class Boat:
    @property
    def oars(self):
        """The oars.

        All of them.
        """
        # counted
        return "é" * 3

    async def row(self): "Row."; return 1

def nothing():
    """Says all there is."""

def silent(): return 2

def outer():
    r"""Out."""
    def inner():
        "In."

        text = """
    a line of its own
"""
        return text
    return inner
'''


def test_functions_without_their_docstrings() -> None:
    inner = 'def inner():\n    text = """\na line of its own\n"""\n    return text\n'
    assert sorted(documented_functions(CODE)) == sorted(
        [
            ('def oars(self):\n    # counted\n    return "é" * 3\n', "The oars."),
            ("async def row(self): return 1\n", "Row."),
            (inner, "In."),
            (
                'def outer():\n    def inner():\n        "In."\n        text = """\n    a line of its own\n"""\n'
                "        return text\n    return inner\n",
                "Out.",
            ),
        ]
    )


NAMES = st.sampled_from(["a", "é", "船"])


@given(
    st.lists(st.tuples(NAMES, st.sampled_from(["pass", "return 'x'", "x = '''\n'''", "...;"])), min_size=1)
)
def test_what_is_left_of_a_function_is_its_code(functions: list[tuple[str, str]]) -> None:
    text = "".join(
        f'class C{at}:\n    def {name}(self, é="{name}"): "{name}."; {body}\n'
        for at, (name, body) in enumerate(functions)
    )
    wanted = ast.parse(text).body
    for (code, said), kept in zip(documented_functions(text), wanted, strict=True):
        function = kept.body[0]  # type: ignore[attr-defined]
        assert said == f"{function.name}."
        del function.body[0]
        assert ast.dump(ast.parse(code).body[0]) == ast.dump(function)


@pytest.mark.slow
def test_the_standard_library_has_thousands_and_all_are_code() -> None:
    pairs = list(read_pairs(["stdlib-docstrings"]))
    assert len(pairs) > 3000
    assert all(pair.target == pair.target.strip() and "\n" not in pair.target for pair in pairs)
    for pair in pairs[::20]:
        ast.parse(pair.source)
