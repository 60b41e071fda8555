"""Importing what DeepSpeed saves: the trained fp32 weights to the last bit, and nothing executed."""

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.build import build_model
from parallel.processes import WorkerPool
from tests.model.hugging_face import LlamaConfig, LlamaForCausalLM
from tests.train.deepspeed_checkpoints import (
    EVEN,
    LLAMA,
    Case,
    save_tensor_parallel,
    to_universal,
    train_and_save,
)
from tests.train.test_command_line import refused, trireme
from train.checkpoint import load_tensors
from train.convert_run import import_run
from train.deepspeed_checkpoint.folder import find_step
from train.deepspeed_checkpoint.read import read_weights
from train.errors import RunError

pytestmark = pytest.mark.slow  # DeepSpeed is imported

TIED = {"tie_word_embeddings": True}
CASES = [
    *(Case(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")),
    *(Case(stage, "bf16", frozen="embed_tokens") for stage in (0, 1, 2, 3)),
    *(Case(stage, "bf16", TIED) for stage in (0, 1, 3)),
    *(Case(stage, "bf16", ranks=ranks) for stage in (2, 3) for ranks in (1, 4)),
    Case(2, zero={"round_robin_gradients": True}),
    Case(1, "bf16", zero={"parameter_alignment": True}),
    Case(1, "bf16", settings={"data_types": {"grad_accum_dtype": "fp32"}}),
    Case(3, zero={"sub_group_size": 1000}),
    Case(3, zero={"offload_optimizer": {"device": "cpu"}}),
]
UNIVERSAL = [Case(1), Case(2, "bf16"), Case(3), Case(3, "bf16", TIED), Case(3, "bf16", frozen="embed_tokens")]


class Saved:
    """Checkpoints by case, each made once, with the weights that were trained."""

    def __init__(self, pools: dict[int, WorkerPool], folder: Path) -> None:
        self._pools, self._folder = pools, folder
        self._trained: dict[str, dict[str, Tensor]] = {}

    def __call__(self, case: Case) -> tuple[Path, dict[str, Tensor]]:
        folder = self._folder / case.name
        if case.name not in self._trained:
            self._trained[case.name] = self._pools[case.ranks].run(train_and_save, case, folder)[0]
        return folder, self._trained[case.name]

    def copy(self, case: Case, to: Path) -> Path:
        """A checkpoint to be tampered with; returns its step's folder."""
        shutil.copytree(self(case)[0], to)
        return to / "global_step2"


@pytest.fixture(scope="module")
def saved(pools: dict[int, WorkerPool], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(pools, tmp_path_factory.mktemp("deepspeed"))


def check_import(source: Path, out: Path, trained: dict[str, Tensor], changes: dict[str, Any]) -> None:
    """That a run's weights are the trained ones, and its logits those of transformers' model with them."""
    config = import_run(source, out, "unused").model
    ours = build_model(config)
    tensors = {f"model.{name}": tensor for name, tensor in ours.state_dict().items()}
    load_tensors(out / "checkpoints" / "step-00000000", tensors)
    theirs = LlamaForCausalLM(LlamaConfig(**LLAMA | changes)).eval()
    theirs.load_state_dict(trained, strict=not theirs.config.tie_word_embeddings)
    tokens = torch.randint(0, LLAMA["vocab_size"], (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trained_weights_come_over_to_the_last_bit(saved: Saved, case: Case, tmp_path: Path) -> None:
    folder, trained = saved(case)
    weights = read_weights(folder / "global_step2")
    assert trained.keys() <= weights.keys()
    for name, expected in trained.items():
        assert torch.equal(weights[name].float(), expected), name
    if case.precision == "bf16" and not case.frozen.strip():  # so it isn't the model's own, rounded weights
        assert not torch.equal(trained["model.norm.weight"].bfloat16().float(), trained["model.norm.weight"])
    check_import(folder, tmp_path / "run", trained, case.model)


@pytest.mark.parametrize("case", UNIVERSAL, ids=lambda case: case.name)
def test_universal_checkpoints(
    saved: Saved, pools: dict[int, WorkerPool], case: Case, tmp_path: Path
) -> None:
    step, (_, trained) = saved.copy(case, tmp_path / "saved"), saved(case)
    universal = tmp_path / "saved" / "universal"
    pools[1].run(to_universal, step, universal)
    for left in [*step.iterdir(), tmp_path / "saved" / "latest"]:
        left.unlink()
    for source in (tmp_path / "saved", universal):
        weights = read_weights(find_step(source) or source)
        for name, expected in trained.items():
            assert torch.equal(weights[name].float(), expected), name
        check_import(source, tmp_path / f"run-{source.name}", trained, case.model)


def test_tensor_parallel_checkpoints_come_as_universal_ones(
    pools: dict[int, WorkerPool], tmp_path: Path
) -> None:
    """As the refusal of what DeepSpeed's AutoTP saves says."""
    with WorkerPool(2) as pool:
        initial, _ = pool.run(save_tensor_parallel, tmp_path / "saved")
    step = tmp_path / "saved" / "global_step1"
    with pytest.raises(
        RunError, match=f"--input_folder {step} --output_folder {step}_universal`, and import"
    ):
        read_weights(step)
    universal = step.with_name("global_step1_universal")
    pools[1].run(to_universal, step, universal)
    check_import(universal, tmp_path / "run", initial, EVEN)


def test_zero_0_on_gpus_keeps_flat_groups(saved: Saved, tmp_path: Path) -> None:
    """DeepSpeed's fused optimizer, which isn't to be had on a CPU, has each group in one tensor."""
    step, (_, trained) = saved.copy(Case(0, "bf16"), tmp_path / "saved"), saved(Case(0, "bf16"))
    file = step / "mp_rank_00_model_states.pt"
    state = torch.load(file)
    groups = state["optimizer"].pop("fp32_groups")
    state["optimizer"]["fp32_groups_flat"] = [torch.cat([w.flatten() for w in group]) for group in groups]
    torch.save(state, file)
    weights = read_weights(step)
    assert all(torch.equal(weights[name], expected) for name, expected in trained.items())

    state["optimizer"]["fp32_groups_flat"][0] = state["optimizer"]["fp32_groups_flat"][0].flip(0)
    torch.save(state, file)
    with pytest.raises(RunError, match="can't be told from others: go on from it under ZeRO 1"):
        read_weights(step)


def test_masters_are_taken_before_rounded_weights_beside_them(saved: Saved, tmp_path: Path) -> None:
    """As transformers' own trainer leaves both."""
    case = Case(2, "bf16")
    saved.copy(case, tmp_path / "saved")
    _, trained = saved(case)
    save_file({n: w.bfloat16() for n, w in trained.items()}, tmp_path / "saved" / "model.safetensors")
    check_import(tmp_path / "saved", tmp_path / "run", trained, {})


def test_the_command(saved: Saved, tmp_path: Path) -> None:
    step = saved.copy(Case(3), tmp_path / "saved")
    config = (tmp_path / "saved" / "config.json").rename(tmp_path / "elsewhere.json")
    out = str(tmp_path / "runs" / "llama")
    line = refused("import", str(tmp_path / "saved"), "--out", out)
    assert line.endswith("give a folder that `save_pretrained` wrote, or `--config` its file")
    done = trireme("import", str(tmp_path / "saved"), "--config", str(config), "--out", out)
    assert f"2 layers of 27, vocabulary 61\nweights: {step}\n" in done.stdout


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


@pytest.mark.parametrize(
    "file",
    ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in (0, 1))],
)
def test_nothing_is_executed(saved: Saved, file: str, tmp_path: Path) -> None:
    step, marker = saved.copy(Case(2), tmp_path / "saved"), tmp_path / "ran"
    state = torch.load(step / file, weights_only=False)
    state["lr_scheduler"] = Payload(marker)
    torch.save(state, step / file)
    with pytest.raises(RunError, match=rf"{file} holds posix.system, and reading that could run code"):
        import_run(tmp_path / "saved", tmp_path / "run", "unused")
    assert not marker.exists() and not (tmp_path / "run").exists()
    torch.load(step / file, weights_only=False)
    assert marker.exists(), "the payload works where it is let"


def test_nothing_is_executed_in_a_universal_checkpoint(saved: Saved, tmp_path: Path) -> None:
    step, marker = saved.copy(Case(1), tmp_path / "saved"), tmp_path / "ran"
    weight = step / "zero" / "model.norm.weight" / "fp32.pt"
    weight.parent.mkdir(parents=True)
    torch.save({"param": Payload(marker)}, weight)
    with pytest.raises(RunError, match="fp32.pt holds posix.system"):
        import_run(tmp_path / "saved", tmp_path / "run", "unused")
    assert not marker.exists()


def change(file: Path, **entries: Any) -> None:
    """Save a file with other entries, of its optimizer's state if it has one."""
    state = torch.load(file, weights_only=False)
    state.get("optimizer_state_dict", state).update(entries)
    torch.save(state, file)


def optimizer_file(step: Path, rank: int) -> Path:
    return step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_file(step: Path) -> Path:
    return step / "mp_rank_00_model_states.pt"


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


WRONG = {
    "no newest": (
        lambda step: (step.parent / "latest").unlink(),
        r"has no file `latest`: give the folder of a step, such as \S+global_step2$",
    ),
    "newest gone": (
        lambda step: (step.parent / "latest").write_text("global_step9"),
        "latest names global_step9, which isn't there",
    ),
    "newest outside": (
        lambda step: (step.parent / "latest").write_text("../.."),
        r"latest names \.\., which isn't there",
    ),
    "first rank's file": (
        lambda step: optimizer_file(step, 0).unlink(),
        "lacks zero_pp_rank_0_mp_rank_00_optim_states.pt: copy it from the node of rank 0$",
    ),
    "last rank's file": (
        lambda step: optimizer_file(step, 1).unlink(),
        "lacks zero_pp_rank_1_mp_rank_00_optim_states.pt: copy it from the node of rank 1$",
    ),
    "all ranks' files": (
        lambda step: list(map(Path.unlink, step.glob("*_optim_states.pt"))),
        r"the fp32 weights are in the \*_optim_states.pt of all ranks: copy these too$",
    ),
    "model file": (
        lambda step: model_file(step).rename(step / "mp_rank_09_model_states.pt.old"),
        "lacks mp_rank_00_model_states.pt or zero_pp_rank_0_mp_rank_00_model_states.pt",
    ),
    "a rank too many": (
        lambda step: shutil.copyfile(optimizer_file(step, 1), optimizer_file(step, 2)),
        r"zero_pp_rank_2_\S+ is of another save, since zero_pp_rank_0_\S+ is one of 2: remove what is older$",
    ),
    "other ranks": (
        lambda step: change(optimizer_file(step, 1), partition_count=[4, 4]),
        r"zero_pp_rank_1_\S+ is of 4 ranks, zero_pp_rank_0_\S+ of 2: not of one save$",
    ),
    "fewer elements": (
        lambda step: change(
            optimizer_file(step, 1), single_partition_of_fp32_groups=[torch.zeros(9), torch.zeros(60)]
        ),
        r"\d+ elements where the model's weights take \d+: the files aren't of one save$",
    ),
    "fewer groups": (
        lambda step: change(optimizer_file(step, 1), single_partition_of_fp32_groups=[torch.zeros(9)]),
        "1 groups where the model has 2: the files aren't of one save$",
    ),
    "more than the file holds": (
        lambda step: change(
            optimizer_file(step, 1), single_partition_of_fp32_groups=[torch.zeros(1).expand(2**40)] * 2
        ),
        "what should be weights is no plain tensor",
    ),
    "no state": (
        lambda step: torch.save({}, optimizer_file(step, 0)),
        "optimizer_state_dict is no dict: it is not a file as DeepSpeed saves it$",
    ),
    "half a file": (lambda step: cut_short(optimizer_file(step, 1)), "is damaged, or not of torch.save"),
    "an old format": (
        lambda step: torch.save({}, model_file(step), _use_new_zipfile_serialization=False),
        "is damaged, or not of torch.save: Expected input to be a checkpoint",
    ),
    "a class of the user's": (
        lambda step: change(model_file(step), arguments=argparse.Namespace(lr=1.0)),
        "mp_rank_00_model_states.pt holds argparse.Namespace, and reading that could run code: save without it",
    ),
    "tensor parallel": (
        lambda step: shutil.copyfile(model_file(step), step / "mp_rank_01_model_states.pt"),
        r"is tensor-parallel \(mp_rank_01_model_states.pt\): let DeepSpeed put it together, by `python -m \S+ds_to",
    ),
    "tensor parallel, one rank's files": (
        lambda step: change(model_file(step), mp_world_size=2),
        r"is tensor-parallel \(mp_world_size=2\)",
    ),
    "pipeline": (
        lambda step: (step / "layer_00-model_states.pt").touch(),
        "is of a pipeline, whose weights have no names of transformers",
    ),
    "experts": (
        lambda step: (step / "layer_0_expert_0_mp_rank_00_model_states.pt").touch(),
        "holds experts of DeepSpeed's own layers",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_in_one_line(saved: Saved, wrong: str, tmp_path: Path) -> None:
    spoil, message = WRONG[wrong]
    spoil(saved.copy(Case(2), tmp_path / "saved"))
    with pytest.raises(RunError) as told:
        import_run(tmp_path / "saved", tmp_path / "run", "unused")
    assert re.search(message, str(told.value)), told.value
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_sizes_under_zero_3(saved: Saved, tmp_path: Path) -> None:
    step = saved.copy(Case(3), tmp_path / "saved")
    change(optimizer_file(step, 1), fp32_flat_groups=[torch.zeros(9)])
    with pytest.raises(RunError, match=r"9 elements where the model's weights take [67]\d\d\d:"):
        read_weights(step)


def test_the_folder_of_a_step_finds_the_configuration_beside_it(saved: Saved, tmp_path: Path) -> None:
    folder, trained = saved(Case(2))
    check_import(folder / "global_step2", tmp_path / "run", trained, {})


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere: no such folder: give one that `save_pretrained` or DeepSp"):
        import_run(tmp_path / "nowhere", tmp_path / "run", "unused")
