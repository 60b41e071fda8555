"""Runs to transformers and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import Tokenizer
from model.errors import ConversionError
from model.sampling import Sampling
from parallel.processes import WorkerPool
from tests.model import hugging_face  # noqa: F401 - mends the import of transformers
from tests.train.running import losses, train_here
from train.config_file import load_config
from train.convert_run import export_run, import_run
from train.errors import RunError
from train.evaluate_run import load_run
from train.run_folder import RunFolder
from train.texts import TextSettings, continuations


@pytest.fixture(scope="module")
def run(pools: dict[int, WorkerPool], tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps."""
    folder = tmp_path_factory.mktemp("runs")
    pools[1].run(train_here, tiny_config, [f"run.dir={folder}", "run.steps=5"])
    return folder / "run"


def text_of(run: Path) -> str:
    """What a run generates, greedily."""
    loaded, greedy = load_run(str(run)), TextSettings(Sampling(temperature=0), 12)
    pieces = continuations(loaded.model, loaded.tokenizer, ["The trireme"], greedy, loaded.device)
    return "".join(piece for (piece,) in pieces)


def test_exported_run_loads_in_transformers_with_equal_logits_and_tokens(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert export_run(str(run), tmp_path / "hf") == "LlamaForCausalLM"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours = load_run(str(run))
    tokens = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours.model(tokens), atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", use_fast=False)
    for text in ("The trireme was a warship.", "  two spaces\nand a line", "oars: 170, é"):
        ids = tokenizer(text)["input_ids"]
        assert ids == ours.tokenizer.encode(text)
        assert tokenizer.decode(ids) == text


def test_imported_run_generates_and_trains_on(
    run: Path, pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    export_run(str(run), tmp_path / "hf")
    back = tmp_path / "runs" / "back"
    _split(tmp_path / "hf" / "model.safetensors")
    import_run(tmp_path / "hf", back, "datasets/unused")
    assert text_of(back) == text_of(run)
    weights, exported = (load_run(str(folder)).model.state_dict() for folder in (back, run))
    assert weights.keys() == exported.keys()
    assert all(torch.equal(weights[name], exported[name]) for name in exported)

    # its first loss is the one with which the exported run would have gone on
    path = load_config(tiny_config).config.data.path
    on = [
        f"data.path={path}",
        "data.micro_batch_size=4",
        "data.global_batch_size=8",
        "data.num_workers=0",
        "run.steps=2",
    ]
    pools[2].run(train_here, str(back / "config.yaml"), on)
    (_, first, _), *_ = losses(run)
    assert losses(back)[0][1] < 0.99 * first
    assert Tokenizer.load(RunFolder(back).tokenizer).vocab_size == 300


def _split(file: Path) -> None:
    """Into two, as transformers saves large models."""
    tensors = list(load_file(file).items())
    for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        save_file(dict(part), file.with_name(f"model-{number:05d}-of-00002.safetensors"))
    file.unlink()


def test_what_is_wrong_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="config.json: No such file or directory"):
        import_run(tmp_path, tmp_path / "new", "unused")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="is not JSON"):
        import_run(tmp_path, tmp_path / "new", "unused")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConversionError, match="is not known here"):
        import_run(tmp_path, tmp_path / "new", "unused")
    with pytest.raises(RunError, match="exists: choose another --out"):
        export_run(str(run), tmp_path)
    assert not (tmp_path / "new").exists()
