"""A codebook of patches of pictures, by which a picture is a grid of numbers.

N pictures, of H x W pixels and C channels; K codes, each a patch of h x w pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import InputError

Array = np.ndarray

_ROWS_AT_ONCE = 4096
_ROUNDS = 30


@dataclass(frozen=True)
class Codebook:
    """Patches (K, h, w, C) uint8 by their code."""

    patches: Array

    @classmethod
    def learn(cls, pictures: Array, patch: int, size: int, seed: int = 0) -> "Codebook":
        """At most `size` patches of patch x patch pixels, by k-means on those of pictures (N, H, W, C) uint8."""
        found = _cut(pictures, patch, patch)
        rows = found.reshape(-1, patch * patch * found.shape[-1])
        distinct = np.unique(rows, axis=0)
        if len(distinct) > size:
            centres = _k_means(rows.astype(np.float32), size, np.random.default_rng(seed))
            distinct = np.unique(centres.round().astype(np.uint8), axis=0)
        return cls(distinct.reshape(-1, patch, patch, pictures.shape[-1]))

    @classmethod
    def load(cls, path: Path) -> "Codebook":
        """Read a file that `save` wrote. Raises InputError."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return cls(load_file(path)["patches"])
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path} is no codebook ({error}): prepare the data again") from error

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        from safetensors.numpy import save_file

        save_file({"patches": self.patches}, path)

    def encode(self, pictures: Array) -> Array:
        """Pictures (N, H, W, C) uint8 -> the nearest codes, (N, H / h, W / w) int64."""
        cut = _cut(pictures, *self.patches.shape[1:3])
        rows = cut.reshape(-1, self.patches[0].size).astype(np.float32)
        centres = self.patches.reshape(len(self.patches), -1).astype(np.float32)
        return _nearest(rows, centres)[0].reshape(cut.shape[:3])

    def decode(self, codes: Array) -> Array:
        """Codes (N, R, S) -> pictures (N, R * h, S * w, C) uint8."""
        height, width, channels = self.patches.shape[1:]
        count, rows, columns = codes.shape
        patches = self.patches[codes].swapaxes(2, 3)
        return patches.reshape(count, rows * height, columns * width, channels)


def grid(pictures: Array, columns: int, least: int = 64, gap: int = 2) -> Array:
    """Pictures (N, H, W, C) uint8 side by side, (H', W', C), each enlarged to at least `least` pixels of height."""
    factor = max(1, -(-least // pictures.shape[1]))
    large = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = large.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap), columns * (width + gap), channels), 128, np.uint8)
    for at, picture in enumerate(large):
        top, left = at // columns * (height + gap), at % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas[:-gap, :-gap]


def write_png(pixels: Array, path: Path) -> None:
    """Write (H, W, C) uint8, grey for one channel, colours for three."""
    from PIL import Image

    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path)


def _cut(pictures: Array, height: int, width: int) -> Array:
    """(N, H, W, C) -> patches (N, H / h, W / w, h, w, C)."""
    count, rows, columns, channels = pictures.shape
    split = pictures.reshape(count, rows // height, height, columns // width, width, channels)
    return split.swapaxes(2, 3)


def _k_means(rows: Array, size: int, draw: np.random.Generator) -> Array:
    """Centres (size, D) of rows (n, D) fp32: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's rounds."""
    centres = rows[[draw.integers(len(rows))]]
    distance = ((rows - centres[0]) ** 2).sum(axis=1)
    while len(centres) < size:
        mass = distance.cumsum(dtype=np.float64)
        chosen = rows[np.searchsorted(mass, draw.random() * mass[-1], side="right")]
        centres = np.vstack((centres, chosen))
        distance = np.minimum(distance, ((rows - chosen) ** 2).sum(axis=1))
    for _ in range(_ROUNDS):
        codes, distance = _nearest(rows, centres)
        counts = np.bincount(codes, minlength=size)
        sums = np.stack([np.bincount(codes, column, size) for column in rows.T], axis=1)
        centres = np.where(counts[:, None] > 0, sums / counts.clip(1)[:, None], centres).astype(np.float32)
        if len(empty := np.flatnonzero(counts == 0)):
            centres[empty] = rows[np.argsort(distance)[-len(empty) :]]
    return centres


def _nearest(rows: Array, centres: Array) -> tuple[Array, Array]:
    """For each row (n, D) the nearest centre (K, D), and the squared distance."""
    squares = (centres**2).sum(axis=1)
    codes, distances = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        chosen = slice(begin, begin + _ROWS_AT_ONCE)
        far = squares - 2 * rows[chosen] @ centres.T
        codes[chosen] = far.argmin(axis=1)
        distances[chosen] = far.min(axis=1) + (rows[chosen] ** 2).sum(axis=1)
    return codes, distances
