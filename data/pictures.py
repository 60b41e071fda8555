"""Pictures and ready codes as a user brings them, with their classes.

N pictures of H x W pixels and C channels.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError, first_line

Array = np.ndarray

SUFFIXES = (".png", ".jpg", ".jpeg")
_AT_ONCE = 256


@dataclass(frozen=True)
class Pictures:
    """Where pictures come from: files that are read when needed, or an array."""

    keys: tuple[str, ...]
    """A name for each that stays the same wherever they lie."""
    classes: Array | None
    """(N,) int64; None where they have none."""
    class_names: tuple[str, ...]
    source: "Array | Path"
    """uint8 (N, H, W, C), or the folder that `keys` are relative to."""
    size: int | None = None
    """Files are resized to so many pixels of height and width; None: they must be alike."""

    def read(self, chosen: list[int]) -> Array:
        """(n, H, W, C) uint8. Raises InputError where a file is no picture or of another size."""
        if isinstance(self.source, np.ndarray):
            return self.source[chosen]
        first = _read_file(self.source / self.keys[0], self.size)
        pictures = [_read_file(self.source / self.keys[at], self.size) for at in chosen]
        for at, picture in zip(chosen, pictures, strict=True):
            if picture.shape != first.shape:
                raise InputError(
                    f"{self.source / self.keys[at]} has the shape {picture.shape}, {self.keys[0]} has "
                    f"{first.shape}: make them alike with --image-size"
                )
        return np.stack(pictures)

    def batches(self) -> Iterator[tuple[range, Array]]:
        """All pictures in order, some at a time, with their places."""
        for begin in range(0, len(self.keys), _AT_ONCE):
            places = range(begin, min(begin + _AT_ONCE, len(self.keys)))
            yield places, self.read(list(places))


def open_pictures(source: str, labels: str | None, size: int | None) -> Pictures:
    """A folder of PNG and JPEG files, each class in a folder of its own; an .npz with `images` and perhaps
    `labels`; or an .npy of images. Arrays are (N, H, W) or (N, H, W, C), uint8 or floats in [0, 1].

    Raises:
        InputError: there is nothing of this kind.
    """
    path = Path(source)
    if path.is_dir():
        if labels is not None:
            raise InputError(f"--labels {labels}: the classes of {source} are its folders; leave it out")
        return _folder(path, size)
    arrays = read_arrays(source, labels, "images")
    images = arrays["images"]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        raise InputError(
            f"{source}: images of the shape {arrays['images'].shape} are none: make it (N, H, W), or (N, H, W, C) "
            f"with C 1 or 3"
        )
    if images.dtype != np.uint8:
        if images.dtype.kind != "f" or not (images.min() >= 0 and images.max() <= 1):
            raise InputError(
                f"{source}: images of type {images.dtype} from {images.min()} to {images.max()}: make them uint8, "
                f"or floats from 0 to 1"
            )
        images = (images * 255).round().astype(np.uint8)
    classes, names = number_classes(arrays.get("labels"), len(images), source)
    return Pictures(tuple(map(str, range(len(images)))), classes, names, images)


def read_arrays(source: str, labels: str | None, name: str) -> dict[str, Array]:
    """The arrays of an .npz, among them `name`; or the one of an .npy, so called; and `labels` of another .npy.

    Raises:
        InputError: a file can't be read, holds objects, or lacks what is needed.
    """
    arrays = _load(source)
    found = {name: arrays} if isinstance(arrays, np.ndarray) else arrays
    if name not in found:
        raise InputError(f"{source} holds {', '.join(found) or 'nothing'}, and no array named `{name}`")
    if labels is not None:
        given = _load(labels)
        if not isinstance(given, np.ndarray):
            raise InputError(f"--labels {labels} is no .npy file of one array")
        found["labels"] = given
    return found


def number_classes(labels: Array | None, count: int, source: str) -> tuple[Array | None, tuple[str, ...]]:
    """Labels, numbers from 0 or names, as (count,) int64, and the classes' names.

    Raises:
        InputError: there is not one label for each.
    """
    if labels is None:
        return None, ()
    if labels.shape != (count,) or labels.dtype.kind not in "iuU":
        raise InputError(
            f"{source}: labels of shape {labels.shape} and type {labels.dtype} don't say the class of each of "
            f"{count}: give one whole number or name each"
        )
    if labels.dtype.kind == "U":
        names, numbers = np.unique(labels, return_inverse=True)
        return numbers.astype(np.int64), tuple(names.tolist())
    if labels.min() < 0:
        raise InputError(f"{source}: a label is {labels.min()}: number the classes from 0")
    return labels.astype(np.int64), tuple(map(str, range(int(labels.max()) + 1)))


def _folder(folder: Path, size: int | None) -> Pictures:
    found = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{folder} holds no {' '.join(SUFFIXES)} file")
    keys = tuple(path.as_posix() for path in found)
    if all(len(path.parts) == 1 for path in found):
        return Pictures(keys, None, (), folder, size)
    labels = np.array([path.parts[0] if len(path.parts) > 1 else "" for path in found])
    if "" in labels:
        raise InputError(
            f"{folder} holds pictures beside folders of pictures: put each into its class's folder"
        )
    classes, names = number_classes(labels, len(keys), str(folder))
    return Pictures(keys, classes, names, folder, size)


def _read_file(path: Path, size: int | None) -> Array:
    from PIL import Image

    try:
        with Image.open(path) as image:
            picture = image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no picture: {first_line(error)}") from error
    if size is not None:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _load(path: str) -> Any:
    """The array of an .npy or the dict of an .npz; nothing in them is executed."""
    try:
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{path} can't be read ({reason}): give a folder of pictures, or an .npz or .npy file of arrays"
        ) from error
