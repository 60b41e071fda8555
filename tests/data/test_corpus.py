"""Every kind of source gives its documents; every kind of bad input is told with its place."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from data.corpus import documents
from data.errors import InputError
from data.sources import cut, find_files

ROWS = [f"row {i} é\n" * (i % 5) for i in range(40)]
TEXTS = [text for text in ROWS if text]


def read(*sources: str | Path, limit: int = 1 << 20, field: str = "text") -> dict[str, str]:
    found = list(documents(cut(find_files(map(str, sources)), limit), field))
    assert all(document.bytes == len(document.text.encode()) for document in found)
    assert len({document.key for document in found}) == len(found)
    return {document.key: document.text for document in found}


def jsonl(rows: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, field: row}).encode() + b"\n" for i, row in enumerate(rows))


def test_text_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("a/one.txt", "a/two.md", "a/b/three.txt", "a/code.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\r\n", newline="")
    (tmp_path / "a" / "empty.txt").touch()
    (tmp_path / "a" / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    folder = tmp_path / "a"
    assert list(read(folder)) == ["b/three.txt", "bom.txt", "one.txt", "two.md"]
    assert read(folder)["one.txt"] == "text of a/one.txt\r\n"
    assert read(folder)["bom.txt"] == "marked"
    assert list(read(folder / "code.py")) == ["code.py"]
    assert list(read(f"{tmp_path}/**/*.py")) == ["a/code.py"]
    assert list(read(f"{folder}/*")) == ["bom.txt", "code.py", "one.txt", "two.md"]
    assert list(read(folder / "one.txt", folder)) == ["one.txt", "b/three.txt", "bom.txt", "two.md"]


def test_jsonl_plain_and_compressed_are_the_same(tmp_path: Path) -> None:
    content = jsonl(ROWS) + b"\n" + b'{"text": "last, without newline"}'
    (tmp_path / "x.jsonl").write_bytes(content)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content))
    halves = content[: len(content) // 2], content[len(content) // 2 :]
    frames = b"".join(zstandard.ZstdCompressor().compress(half) for half in halves)
    (tmp_path / "x.jsonl.zst").write_bytes(frames)
    plain = read(tmp_path / "x.jsonl")
    assert list(plain.values()) == [*TEXTS, "last, without newline"]
    for packed in ("x.jsonl.gz", "x.jsonl.zst"):
        assert list(read(tmp_path / packed).values()) == list(plain.values())


@pytest.mark.parametrize("limit", [1, 7, 50, 333, 10_000])
def test_a_jsonl_in_pieces_is_the_same(tmp_path: Path, limit: int) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(ROWS))
    whole = read(tmp_path / "x.jsonl")
    assert list(whole.values()) == TEXTS
    assert read(tmp_path / "x.jsonl", limit=limit) == whole


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pa.table({"n": range(40), "body": ROWS}), path, row_group_size=7)
    whole = read(path, field="body")
    assert list(whole.values()) == TEXTS
    assert whole["x.parquet#9"] == ROWS[9]
    assert len(list(cut(find_files([str(path)]), 100))) == 6
    assert read(path, limit=100, field="body") == whole


def test_hugging_face_dataset_on_disk(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"n": list(range(40)), "text": ROWS})
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "split")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "trainless")
    assert list(read(tmp_path / "plain").values()) == TEXTS
    assert read(tmp_path / "plain", limit=100) == read(tmp_path / "plain")
    assert list(read(tmp_path / "split").values()) == TEXTS
    with pytest.raises(InputError, match=r"no split `train`.*test"):
        read(tmp_path / "trainless")


def test_the_standard_library() -> None:
    files = find_files(["python-stdlib"])
    keys = [file.key for file in files]
    assert keys == sorted(keys)
    assert {"json/decoder.py", "argparse.py"} <= set(keys)
    assert not any({"site-packages", "test", "idlelib"} & set(key.split("/")) for key in keys)
    some = [piece for piece in cut(files, 1 << 20) if piece.file.key in ("this.py", "json/decoder.py")]
    assert "class JSONDecoder" in next(documents(some)).text


BAD = {
    "missing.txt": (None, r"missing\.txt doesn't exist"),
    "no*match": (None, "matches no file"),
    "folder/": ({"folder/code.py": b"x"}, r"holds no .*\*\*/\*\.py"),
    "latin.txt": ({"latin.txt": b"fine\ncaf\xe9"}, r"latin\.txt is not UTF-8 \(byte 8, line 2\)"),
    "a.jsonl": ({"a.jsonl": b'{"text": "x"}\n\n{oops\n'}, r"a\.jsonl, line 3 is not JSON"),
    "b.jsonl": (
        {"b.jsonl": b'{"text": "x"}\n{"body": 1}\n'},
        r"b\.jsonl, line 2 has no text.*fields are body",
    ),
    "c.jsonl": ({"c.jsonl": b"[1]\n"}, r"c\.jsonl, line 1 has no text.*no object"),
    "d.jsonl": ({"d.jsonl": b'{"text": "\\ud800"}\n'}, r"d\.jsonl \(byte 0\) holds half a surrogate"),
    "e.jsonl": ({"e.jsonl": b"\xff\xfe\n"}, r"e\.jsonl, line 1 is not JSON"),
    "f.jsonl.gz": ({"f.jsonl.gz": b"no gzip"}, r"f\.jsonl\.gz is damaged"),
    "g.jsonl.gz": ({"g.jsonl.gz": gzip.compress(os.urandom(5000))[:2000]}, r"g\.jsonl\.gz"),
    "h.jsonl.zst": ({"h.jsonl.zst": b"no zstandard"}, r"h\.jsonl\.zst can't be read: damaged"),
    "i.parquet": ({"i.parquet": b"no parquet at all"}, r"i\.parquet is no parquet file"),
    "hf/": ({"hf/state.json": b"{}", "hf/dataset_info.json": b"{}"}, r"hf is no Hugging Face dataset"),
}


@pytest.mark.parametrize("source", BAD)
def test_bad_input_is_told_in_one_line(tmp_path: Path, source: str) -> None:
    files, message = BAD[source]
    for name, content in (files or {}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / source)
    assert "\n" not in str(caught.value)


def test_line_numbers_are_those_of_the_file_in_later_pieces(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(ROWS) + b"oops\n")
    with pytest.raises(InputError, match="line 41 is not JSON"):
        read(tmp_path / "x.jsonl", limit=100)


def test_bad_rows_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(InputError, match=r"x\.parquet, row 1 holds NoneType"):
        read(path)
    with pytest.raises(InputError, match=r"no column `body`.*--text-field \(text\)"):
        read(path, field="body")


def test_an_unreadable_file(tmp_path: Path) -> None:
    """A folder that looks like a file is unreadable even to root."""
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(InputError, match="holds no"):
        read(tmp_path / "x.jsonl")
    subprocess.run(["ln", "-s", "nowhere", tmp_path / "y.txt"], check=True)
    with pytest.raises(InputError, match="doesn't exist"):
        read(tmp_path / "y.txt")


def test_no_source() -> None:
    with pytest.raises(InputError, match="--source"):
        find_files([])
