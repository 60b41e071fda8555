"""Checkpoints of no tensors, for what only looks at manifests."""

import json
from dataclasses import asdict
from pathlib import Path

from train.checkpoint_folder import FORMAT, MANIFEST, Progress, digest


def fake_checkpoint(folder: Path, step: int, validation_loss: float | None = None) -> Path:
    """A whole checkpoint of a step, whose loss is 1/step."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    progress = Progress(step, step * 10, {}, loss=1 / step, validation_loss=validation_loss)
    manifest = {"format": FORMAT, "progress": asdict(progress), "files": {}}
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest(manifest)}))
    return path
