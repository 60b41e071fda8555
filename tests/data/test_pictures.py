"""Pictures become codes that come back as nearly the same pictures, with their classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.codebook import Codebook, grid, write_png
from data.config import DataConfig
from data.dataset import ImageCodesInfo, open_dataset
from data.errors import InputError
from data.parts import place
from data.prepare_pictures import prepare_pictures
from data.stream import TrainingStream, validation_batches
from parallel.processes import WorkerPool
from tests.data.test_prepare import tree


def pictures(count: int = 60, channels: int = 1) -> np.ndarray:
    """(N, 8, 8, C) of few colours, so that a codebook can hold them."""
    draw = np.random.default_rng(0)
    small = draw.integers(0, 3, (count, 4, 2, channels)) * 100
    return small.repeat(2, axis=1).repeat(4, axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 pictures of three classes, as an array."""
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    np.savez(path, images=pictures(), labels=np.arange(60) % 3)
    return str(path)


@pytest.fixture(scope="module")
def coded(npz: str, tmp_path_factory: pytest.TempPathFactory) -> ImageCodesInfo:
    """The same, prepared."""
    out = tmp_path_factory.mktemp("coded") / "set"
    return prepare_pictures(npz, out, patch_size=2, codebook_size=8, validation_fraction=0.3)


def rows(info: ImageCodesInfo, batch_size: int = 7) -> dict[int, tuple[np.ndarray, int]]:
    """The validation split's codes (R, S) and class by sample id."""
    found = {}
    for batch in validation_batches(str(info.path), batch_size, 0, 1, inputs=("tokens", "classes")):
        tokens, targets = batch.inputs["tokens"].numpy(), batch.targets.numpy()
        for at, sample in enumerate(batch.sample_ids.tolist()):
            if sample < 0:
                assert (targets[at] == -100).all()
                continue
            assert tokens[at, 0] == info.start_id and (tokens[at, 1:] == targets[at, :-1]).all()
            codes = targets[at].reshape(info.height, info.width)
            found[sample] = (codes, int(batch.inputs["classes"][at]))
    return found


def test_what_is_read_is_what_was_given(coded: ImageCodesInfo) -> None:
    assert open_dataset(coded.path) == coded
    assert (coded.height, coded.width, coded.seq_len) == (4, 4, 16)
    assert coded.class_names == ("0", "1", "2") and coded.columns == ("tokens", "classes")
    assert coded.vocab_size == coded.pad_id + 1 == 4, "no more codes than different patches, and the start"
    assert coded.train.documents + coded.validation.documents == 60
    read = rows(coded)
    held_out = [at for at in range(60) if place(str(at)) < 0.3]
    assert len(read) == len(held_out) == coded.validation.sequences
    book = Codebook.load(coded.codebook_path)
    for (codes, label), at in zip((read[i] for i in sorted(read)), held_out, strict=True):
        assert label == at % 3
        assert (book.decode(codes[None])[0] == pictures()[at]).all()


def test_preparing_again_makes_the_same_bytes(coded: ImageCodesInfo, npz: str, tmp_path: Path) -> None:
    again = prepare_pictures(npz, tmp_path / "again", patch_size=2, codebook_size=8, validation_fraction=0.3)
    assert again.digest == coded.digest
    assert tree(again.path) == tree(coded.path)
    with pytest.raises(InputError, match="again exists: choose another --out"):
        prepare_pictures(npz, tmp_path / "again")


def test_a_folder_of_folders(tmp_path: Path) -> None:
    colours = pictures(20, channels=3)
    for at, picture in enumerate(colours):
        folder = tmp_path / "in" / ("cat", "dog")[at % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write_png(picture, folder / f"{at:02}.png")
    info = prepare_pictures(str(tmp_path / "in"), tmp_path / "out", patch_size=4, validation_fraction=0.3)
    assert info.class_names == ("cat", "dog") and (info.height, info.width) == (2, 2)
    keys = sorted(f"{('cat', 'dog')[at % 2]}/{at:02}.png" for at in range(20))
    held_out = [key for key in keys if place(key) < 0.3]
    book = Codebook.load(info.codebook_path)
    read = rows(info)
    for sample, key in enumerate(held_out):
        codes, label = read[sample]
        assert info.class_names[label] == key[:3]
        assert (book.decode(codes[None])[0] == colours[int(key[4:6])]).all()

    grey = prepare_pictures(
        str(tmp_path / "in" / "cat"), tmp_path / "small", image_size=4, patch_size=2, validation_fraction=0.3
    )
    assert grey.class_names == () and grey.columns == ("tokens",) and (grey.height, grey.width) == (2, 2)
    Image.new("L", (9, 9)).save(tmp_path / "in" / "dog" / "other.jpg")
    with pytest.raises(InputError, match=r"other.jpg has the shape \(9, 9, 1\).*--image-size"):
        prepare_pictures(str(tmp_path / "in"), tmp_path / "uneven", validation_fraction=0.3)
    (tmp_path / "in" / "dog" / "other.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"other.jpg is no picture"):
        prepare_pictures(str(tmp_path / "in"), tmp_path / "broken", validation_fraction=0.3)
    (tmp_path / "in" / "dog" / "other.jpg").rename(tmp_path / "in" / "other.jpg")
    with pytest.raises(InputError, match="pictures beside folders"):
        prepare_pictures(str(tmp_path / "in"), tmp_path / "mixed")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".unfinished")]


@pytest.mark.parametrize("with_codebook", [True, False])
def test_codes_of_the_users_own(tmp_path: Path, with_codebook: bool) -> None:
    codes = np.random.default_rng(0).integers(0, 6, (40, 3, 2))
    codes[0, 0, 0] = 5
    labels = np.array(["oar", "hull"] * 20)
    if with_codebook:
        book = {"codebook": np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)}
        np.savez(tmp_path / "codes.npz", codes=codes, labels=labels, **book)
        source, given = tmp_path / "codes.npz", None
    else:
        np.save(tmp_path / "codes.npy", codes)
        np.save(tmp_path / "labels.npy", labels)
        source, given = tmp_path / "codes.npy", str(tmp_path / "labels.npy")
    info = prepare_pictures(
        str(source), tmp_path / "out", kind="codes", labels=given, validation_fraction=0.3
    )
    assert (info.height, info.width, info.start_id) == (3, 2, 7 if with_codebook else 6)
    assert info.class_names == ("hull", "oar")
    read = rows(info)
    for sample, at in enumerate(at for at in range(40) if place(str(at)) < 0.3):
        assert (read[sample][0] == codes[at]).all() and info.class_names[read[sample][1]] == labels[at]
    shown = Codebook.load(info.codebook_path).decode(codes[:1])
    assert shown.shape == ((1, 6, 4, 1) if with_codebook else (1, 3, 2, 1))


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"other": np.zeros(3)}, {}, "holds other, and no array named `images`"),
        ({"images": np.zeros((4, 8))}, {}, r"images of the shape \(4, 8\)"),
        ({"images": np.full((4, 8, 8), 7.0)}, {}, "from 7.0 to 7.0: make them uint8, or floats from 0 to 1"),
        ({"images": pictures(), "labels": np.zeros(5, int)}, {}, "the class of each of 60"),
        ({"images": pictures(), "labels": np.full(60, -1)}, {}, "a label is -1"),
        ({"images": pictures()}, {"patch_size": 3}, r"--patch-size 3 doesn't divide .*--image-size 9"),
        ({"images": pictures()}, {"patch_size": 0}, "--patch-size 0"),
        ({"images": pictures(1)}, {}, "none of 1 pictures falls into the"),
        ({"images": np.array([None])}, {}, "can't be read"),
        ({"codes": np.zeros((4, 2, 2))}, {"kind": "codes"}, "of whole numbers from 0"),
        (
            {"codes": np.full((4, 2, 2), 9), "codebook": np.zeros((3, 1, 1, 1), np.uint8)},
            {"kind": "codes"},
            "with K above the largest code, 9",
        ),
    ],
)
def test_what_is_wrong_is_told(
    tmp_path: Path, arrays: dict[str, np.ndarray], options: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "given.npz", **arrays)
    with pytest.raises(InputError, match=message) as caught:
        prepare_pictures(str(tmp_path / "given.npz"), tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none(tmp_path: Path, npz: str) -> None:
    with pytest.raises(InputError, match="can't be read"):
        prepare_pictures(str(tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(InputError, match="holds no .png .jpg .jpeg file"):
        prepare_pictures(str(tmp_path), tmp_path / "out")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(InputError, match="text.npy can't be read"):
        prepare_pictures(str(tmp_path / "text.npy"), tmp_path / "out")
    with pytest.raises(InputError, match="is no .npy file of one array"):
        prepare_pictures(npz, tmp_path / "out", labels=npz)
    with pytest.raises(InputError, match="can't be made"):
        prepare_pictures(npz, tmp_path / "text.npy" / "out", patch_size=2)


def test_a_codebook_finds_the_clusters() -> None:
    draw = np.random.default_rng(1)
    middles = np.array([[20, 20, 20, 20], [200, 20, 20, 200], [20, 200, 200, 20], [220, 220, 220, 220]])
    rows = middles[draw.integers(0, 4, 400)] + draw.integers(-9, 10, (400, 4))
    images = rows.astype(np.uint8).reshape(400, 2, 2, 1)
    book = Codebook.learn(images, 2, 4)
    assert len(book.patches) == 4
    found = sorted(book.patches.reshape(4, 4).astype(int).tolist())
    assert np.abs(np.array(found) - np.array(sorted(middles.tolist()))).max() <= 2
    back = book.decode(book.encode(images)).astype(int)
    assert np.abs(back - images).max() <= 12


def test_a_grid_is_enlarged_and_filled_row_by_row() -> None:
    tiles = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, axis=1)
    pixels = grid(tiles, columns=2, least=4, gap=1)
    assert pixels.shape == (4 + 1 + 4, 2 + 1 + 2, 1)
    assert (pixels[:4, :2] == 0).all() and (pixels[:4, 3:] == 1).all() and (pixels[5:, :2] == 2).all()
    assert (pixels[4] == 128).all() and (pixels[5:, 3:] == 128).all()


def share(path: str, batches: int) -> list[tuple[int, int, int]]:
    """Sample ids, seeds and classes of this rank's share, in order."""
    import torch.distributed as dist

    config = DataConfig(path=path, micro_batch_size=2, global_batch_size=8, num_workers=0)
    stream = TrainingStream(config, 3, dist.get_rank(), dist.get_world_size(), ("seeds", "classes"))
    found = []
    for _ in range(batches):
        batch = next(stream)
        assert set(batch.inputs) == {"seeds", "classes"}
        columns = (batch.sample_ids, batch.inputs["seeds"], batch.inputs["classes"])
        found += list(zip(*(column.tolist() for column in columns), strict=True))
    stream.close()
    return found


def test_seeds_are_a_function_of_step_and_sequence(
    coded: ImageCodesInfo, pools: dict[int, WorkerPool]
) -> None:
    (one,) = pools[1].run(share, str(coded.path), 8)
    shares = pools[2].run(share, str(coded.path), 8)
    for step in range(8):
        theirs = [row for part in shares for row in part[4 * step : 4 * step + 4]]
        assert sorted(theirs) == sorted(one[8 * step : 8 * step + 8])
    assert len({seed for _, seed, _ in one}) == len(one), "another seed in every epoch"
    assert {label for _, _, label in one} == {0, 1, 2}


def test_a_set_without_a_kind_is_text(coded: ImageCodesInfo, prepared: Any, tmp_path: Path) -> None:
    described = json.loads((prepared.path / "dataset.json").read_text())
    assert described.pop("kind") == "text"
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    assert type(open_dataset(tmp_path)) is type(prepared)
