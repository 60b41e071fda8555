"""`trireme checkpoint average`: the mean of weights, as a run that the other commands take."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.processes import WorkerPool
from tests.train.running import losses, train_here
from train import checkpoint
from train.average import average_run
from train.checkpoint_folder import Progress, complete
from train.cli import app
from train.commit import begin, commit, place
from train.convert_run import export_run
from train.errors import RunError
from train.evaluate_run import load_run
from train.run_folder import RunFolder
from train.stored import Stored
from train.tensor_files import Piece, write_tensors

STEPS = range(1, 6)


@pytest.fixture(scope="module")
def run(pools: dict[int, WorkerPool], tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps on two ranks, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("runs")
    keep = ["checkpoint.every_steps=1", "checkpoint.keep=9"]
    pools[2].run(train_here, tiny_config, [f"run.dir={folder}", "run.steps=5", *keep])
    return folder / "run"


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    path = RunFolder(run).checkpoints / f"step-{step:08d}"
    tensors = {
        name: torch.zeros(shape, dtype=dtype)
        for name, (shape, dtype) in Stored(path).facts.items()
        if name.startswith("model.")
    }
    checkpoint.load_tensors(path, tensors)
    return tensors


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [([], [1, 2, 3, 4, 5]), (["--last", "3"], [3, 4, 5]), (["--steps", "4,2"], [2, 4])],
)
def test_is_the_mean(
    run: Path, tmp_path: Path, arguments: list[str], steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mean"
    app(["checkpoint", "average", str(run), "--out", str(out), *arguments], standalone_mode=False)
    assert capsys.readouterr().out.endswith(f"steps {', '.join(map(str, steps))}\n")
    each = [weights_of(run, step) for step in steps]
    mean = weights_of(out, 0)
    assert mean.keys() == each[0].keys()
    for name, tensor in mean.items():
        assert torch.equal(tensor, torch.stack([one[name].double() for one in each]).mean(0).float()), name
    assert not any(name.startswith("optimizer") for name in Stored(complete(out / "checkpoints")[0]).facts)


def test_can_be_used_as_any_run(
    run: Path, pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    out = tmp_path / "mean"
    average_run(str(run), out, last=2)
    model = load_run(str(out)).model.state_dict()
    assert all(torch.equal(model[name.removeprefix("model.")], t) for name, t in weights_of(out, 0).items())
    assert export_run(str(out), tmp_path / "hf") == "LlamaForCausalLM"
    pools[2].run(train_here, str(out / "config.yaml"), ["run.steps=2", "optimizer.lr=1e-4"])
    (_, first, _), *_ = losses(run)
    assert [step for step, _, _ in losses(out)] == [1, 2]
    assert losses(out)[0][1] < 0.99 * first


def test_what_cannot_be_averaged_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no checkpoint of step 7, 9: it has 1, 2, 3, 4, 5"):
        average_run(str(run), tmp_path / "out", [1, 7, 9])
    with pytest.raises(RunError, match="has 5 checkpoints, not 6: use --last 5"):
        average_run(str(run), tmp_path / "out", last=6)
    with pytest.raises(RunError, match="exists"):
        average_run(str(run), tmp_path)
    for arguments, error in (
        (["--steps", "1", "--last", "2"], "keep one"),
        (["--steps", "1,x"], "are no numbers"),
    ):
        with pytest.raises(RunError, match=error):
            app(
                ["checkpoint", "average", str(run), "--out", str(tmp_path / "out"), *arguments],
                standalone_mode=False,
            )
    assert not (tmp_path / "out").exists()


def run_of(folder: Path, source: Path, *weights: dict[str, torch.Tensor]) -> str:
    """A run with checkpoints of these weights, of steps 1, 2 ..."""
    folder.mkdir()
    RunFolder(folder).config.write_text(RunFolder(source).config.read_text())
    for step, tensors in enumerate(weights, start=1):
        final = place(RunFolder(folder).checkpoints, step)
        pieces = [Piece(name, t.dtype, tuple(t.shape), (0,) * t.dim()) for name, t in tensors.items()]
        file, read = begin(final) / "weights.safetensors", partial(_of, tensors)
        commit(final, [write_tensors(file, pieces, read)], Progress(step, 0, {}), {})
    return str(folder)


def _of(tensors: dict[str, torch.Tensor], piece: Piece) -> torch.Tensor:
    return tensors[piece.name]


ONES: dict[str, Any] = {"model.a": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("other", "error"),
    [
        ({"model.a": torch.ones(3, 2)}, r"model.a is torch.float32 of \(2, 3\) in .*, and .* of \(3, 2\) in"),
        ({"model.a": torch.ones(2, 3).bfloat16()}, r"and torch.bfloat16 of \(2, 3\) in"),
        (ONES | {"model.b": torch.ones(1)}, "model.b is missing in"),
        ({"model.b": torch.ones(2, 3)}, r"model.a is torch.float32 of \(2, 3\) in .*, and missing in"),
    ],
)
def test_other_weights_are_refused(
    run: Path, tmp_path: Path, other: dict[str, torch.Tensor], error: str
) -> None:
    with pytest.raises(RunError, match=error):
        average_run(run_of(tmp_path / "odd", run, ONES, other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_small_dtypes_are_summed_up_in_large_ones(run: Path, tmp_path: Path) -> None:
    """Of 512 and eight times 1 in bfloat16, whose sum in it is 512."""
    weights = [{"model.a": torch.tensor([value], dtype=torch.bfloat16)} for value in (512.0, *[1.0] * 8)]
    average_run(run_of(tmp_path / "odd", run, *weights), tmp_path / "out")
    mean = Stored(complete(tmp_path / "out" / "checkpoints")[0]).read("model.a")
    assert torch.equal(mean, torch.tensor([520 / 9], dtype=torch.bfloat16))
    assert mean != torch.tensor([512 / 9], dtype=torch.bfloat16)


def test_damaged_one_is_refused(run: Path, tmp_path: Path) -> None:
    path = Path(run_of(tmp_path / "odd", run, ONES, ONES)) / "checkpoints" / "step-00000002"
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"progress": {}}))
    with pytest.raises(RunError, match="step-00000002 is damaged: .*: leave step 2 out"):
        average_run(str(tmp_path / "odd"), tmp_path / "out")
