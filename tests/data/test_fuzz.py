"""Whatever a file holds, reading it gives documents or one line that says what is wrong."""

import gzip
import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.corpus import documents
from data.dataset import DatasetInfo, dataset_path, open_dataset
from data.errors import InputError
from data.pairs import read_pairs
from data.pictures import open_pictures
from data.shards import read_index
from data.sources import cut, find_files
from data.stream import validation_batches
from data.tokenizer import Tokenizer

EXAMPLES = 100
ROWS = "".join(json.dumps({"text": f"row {i} é"}) + "\n" for i in range(8)).encode()
PAIRS = b'{"source": "row", "target": "sink"}\n' * 4


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"n": [1, 2], "text": ["row", "sink"]}), file, row_group_size=1)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, images=np.zeros((2, 4, 4), np.uint8), labels=np.arange(2))
    return file.getvalue()


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "PNG")
    return file.getvalue()


def read_picture(path: Path) -> None:
    list(open_pictures(str(path.parent), None, 4).batches())


def read_documents(path: Path) -> None:
    for document in documents(cut(find_files([str(path)]), 64)):
        assert document.text.encode() and document.key


def read_hugging_face(path: Path) -> None:
    folder = path.parent / "hf"
    folder.mkdir(exist_ok=True)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_bytes(path.read_bytes())
    read_documents(folder)


READERS: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "text": ("a.txt", "text é".encode(), read_documents),
    "jsonl": ("a.jsonl", ROWS, read_documents),
    "jsonl.gz": ("a.jsonl.gz", gzip.compress(ROWS), read_documents),
    "jsonl.zst": ("a.jsonl.zst", zstandard.ZstdCompressor().compress(ROWS), read_documents),
    "parquet": ("a.parquet", parquet(), read_documents),
    "hugging face": ("a.json", b'{"_data_files": [{"filename": "a.arrow"}]}', read_hugging_face),
    "pairs": ("b.jsonl", PAIRS, lambda path: list(read_pairs([str(path)]))),
    "pictures": ("a.npz", npz(), lambda path: list(open_pictures(str(path), None, None).batches())),
    "picture": ("a.png", png(), read_picture),
    "tokenizer": ("tokenizer.model", b"\n\x0b\n\x05<unk>\x15\0\0\0\0\x18\x02", Tokenizer.load),
}


def mutations(valid: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, and valid ones with some changed, cut out, or put in."""

    def change(place: int, gone: int, put: bytes) -> bytes:
        at = place % (len(valid) + 1)
        return valid[:at] + put + valid[at + gone :]

    changed = st.builds(change, st.integers(0, len(valid)), st.integers(0, 20), st.binary(max_size=20))
    return st.binary(max_size=100) | changed


def told(read: Callable[[], object]) -> None:
    """`read` succeeds, or says in one line what is wrong."""
    try:
        read()
    except InputError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("kind", READERS)
def test_any_file_gives_what_it_holds_or_a_line(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    name, valid, read = READERS[kind]
    path = tmp_path_factory.mktemp("fuzz") / name

    @given(mutations(valid))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told(lambda: read(path))

    fuzz()


def test_a_column_whose_name_is_no_text_gives_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet().replace(b"text", b"\x98ext"))
    with pytest.raises(InputError, match="is no parquet file: 'utf-8' codec can't decode"):
        read_documents(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_description_of_a_data_set_gives_a_line(
    prepared: DatasetInfo, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-set"
    (folder / "train").mkdir(parents=True, exist_ok=True)
    info = DatasetInfo(folder, 1, 1, 0, prepared.train, prepared.train, "")
    checks: dict[Path, Callable[[], object]] = {
        dataset_path(folder): lambda: open_dataset(folder),
        folder / "train" / "index.json": lambda: read_index(info, "train"),
    }
    for file, check in checks.items():
        original = (prepared.path / file.relative_to(folder)).read_bytes()
        described = json.loads(original)
        place, key = described, data.draw(st.sampled_from(sorted(described)))
        if isinstance(described[key], list) and data.draw(st.booleans()):
            place, key = described[key][0], data.draw(st.sampled_from(sorted(described[key][0])))
        place[key] = data.draw(JSON)
        written = st.just(json.dumps(described).encode()) | JSON.map(json.dumps).map(str.encode)
        file.write_bytes(data.draw(written | mutations(original)))
        told(check)


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_a_shard_give_sequences_or_a_line(
    prepared: DatasetInfo, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-shards"
    if not folder.exists():
        shutil.copytree(prepared.path, folder)
    shard = read_index(prepared, "validation")[0]
    path = folder / shard.path.relative_to(prepared.path)
    path.write_bytes(data.draw(mutations(shard.path.read_bytes())))
    told(lambda: next(iter(validation_batches(str(folder), 4, 0, 1))))
