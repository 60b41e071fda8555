"""From pictures, or codes that the user brings, to a data set of sequences of codes."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.codebook import Codebook
from data.dataset import (
    COLUMN,
    SPLITS,
    ImageCodesInfo,
    Split,
    SplitInfo,
    digest_of,
    empty_split,
    made_whole,
    write_dataset,
)
from data.errors import InputError
from data.light_streaming import import_streaming
from data.parts import place
from data.pictures import Pictures, number_classes, open_pictures, read_arrays

Array = np.ndarray

_SAMPLE = 4096
"""Pictures on which the codebook is learned."""


def prepare_pictures(
    source: str,
    out: str | Path,
    *,
    kind: Literal["images", "codes"] = "images",
    labels: str | None = None,
    patch_size: int = 4,
    codebook_size: int = 512,
    image_size: int | None = None,
    validation_fraction: float = 0.05,
) -> ImageCodesInfo:
    """Make a data set in `out`. The same input and options give the same bytes. It is written aside, and renamed.

    kind images: see `open_pictures`; a codebook is learned by k-means on their patches. kind codes: an .npz with
    `codes` (N, R, S) of whole numbers from 0, perhaps `labels` (N,) and a `codebook` (K, h, w, C) uint8; or an
    .npy of codes. Codes without a codebook are shown as shades of grey.

    Raises:
        InputError: the source, the options or `out` can't be used.
    """
    folder = Path(os.path.normpath(out))
    with made_whole(folder) as aside:
        if kind == "codes":
            codes, codebook, classes, names = _given_codes(source, labels)
            keys = tuple(map(str, range(len(codes))))
            batches = iter([(range(len(codes)), codes)])
            height, width = codes.shape[1:]
        else:
            pictures = open_pictures(source, labels, image_size)
            codebook = _learn(pictures, patch_size, codebook_size)
            keys, classes, names = pictures.keys, pictures.classes, pictures.class_names
            batches = ((places, codebook.encode(values)) for places, values in pictures.batches())
            height, width = (size // patch_size for size in pictures.read([0]).shape[1:3])
        splits: list[Split] = ["validation" if place(key) < validation_fraction else "train" for key in keys]
        for split in SPLITS:
            if split not in splits:
                raise empty_split(split, len(keys), "pictures", validation_fraction)
        start = len(codebook.patches)
        info = ImageCodesInfo(
            path=aside,
            seq_len=height * width,
            vocab_size=start + 1,
            pad_id=start,
            train=_split_info(splits.count("train"), codebook, height, width),
            validation=_split_info(splits.count("validation"), codebook, height, width),
            digest="",
            height=height,
            width=width,
            class_names=names,
        )
        _write(info, codebook, batches, classes, splits)
        info = replace(info, digest=digest_of(aside, info.files))
        write_dataset(info, {"source": source, "kind": kind})
    return replace(info, path=folder)


def _split_info(pictures: int, codebook: Codebook, height: int, width: int) -> SplitInfo:
    tokens = pictures * height * width
    return SplitInfo(pictures, tokens, tokens * codebook.patches[0].size, pictures)


def _learn(pictures: Pictures, patch: int, size: int) -> Codebook:
    if patch < 1 or size < 2:
        raise InputError(f"--patch-size {patch} --codebook-size {size}: give at least 1 and 2")
    count = len(pictures.keys)
    sample = pictures.read([at * count // min(count, _SAMPLE) for at in range(min(count, _SAMPLE))])
    if any(pixels % patch for pixels in sample.shape[1:3]):
        height, width = sample.shape[1:3]
        raise InputError(
            f"--patch-size {patch} doesn't divide pictures of {height} x {width} pixels: choose one that does, "
            f"or --image-size {max(1, round(height / patch)) * patch}"
        )
    return Codebook.learn(sample, patch, size)


def _given_codes(source: str, labels: str | None) -> tuple[Array, Codebook, Array | None, tuple[str, ...]]:
    arrays = read_arrays(source, labels, "codes")
    codes = arrays["codes"]
    if codes.ndim != 3 or codes.dtype.kind not in "iu" or not codes.size or codes.min() < 0:
        raise InputError(
            f"{source}: codes of shape {codes.shape} and type {codes.dtype}: make it (N, rows, columns) of whole "
            f"numbers from 0"
        )
    count = int(codes.max()) + 1
    shades = np.linspace(0, 255, count).round().astype(np.uint8).reshape(count, 1, 1, 1)
    patches = arrays.get("codebook", shades)
    if patches.ndim != 4 or patches.dtype != np.uint8 or len(patches) < count:
        raise InputError(
            f"{source}: a codebook of shape {patches.shape} and type {patches.dtype}: make it (K, h, w, C) of uint8, "
            f"with K above the largest code, {count - 1}"
        )
    return (
        codes.astype(np.int64),
        Codebook(patches),
        *number_classes(arrays.get("labels"), len(codes), source),
    )


def _write(
    info: ImageCodesInfo,
    codebook: Codebook,
    batches: Iterator[tuple[range, Array]],
    classes: Array | None,
    splits: list[Split],
) -> None:
    import_streaming()
    from streaming import MDSWriter

    codebook.save(info.codebook_path)
    dtype = np.dtype(np.uint16 if info.vocab_size <= 1 << 16 else np.uint32)
    columns = {COLUMN: f"ndarray:{dtype.name}:{info.seq_len + 1}"}
    if classes is not None:
        columns["classes"] = "int"
    writers = {
        split: MDSWriter(columns=columns, out=str(info.path / split), hashes=["sha256"]) for split in SPLITS
    }
    for places, codes in batches:
        for at, picture in zip(places, codes, strict=True):
            sample: dict[str, Any] = {COLUMN: np.array([info.start_id, *picture.flatten()], dtype)}
            if classes is not None:
                sample["classes"] = int(classes[at])
            writers[splits[at]].write(sample)
    for writer in writers.values():
        writer.finish()
