"""Runs to Hugging Face folders, and the reverse."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.convert.architecture import export_weights, import_weights
from model.convert.choose import choose, read_config
from model.errors import ConversionError
from parallel.processes import process_group
from train import checkpoint
from train.checkpoint_folder import Progress
from train.config import CheckpointConfig, Config
from train.deepspeed_checkpoint.folder import find_step
from train.deepspeed_checkpoint.read import read_weights
from train.errors import RunError
from train.evaluate_run import load_run
from train.run_folder import RunFolder, make_folder, to_yaml

log = logging.getLogger(__name__)

_TOKENIZERS = ("tokenizer.model", "spiece.model")
"""What sentencepiece's models are called; the second by T5."""
_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": False,
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
}


def export_run(run: str, out: Path) -> str:
    """Write a run's newest checkpoint as `config.json`, `model.safetensors` and tokenizer. Returns the class's name.

    Raises:
        ConversionError: no architecture of theirs holds the model.
        RunError: no such run, or `out` exists.
    """
    loaded = load_run(run)
    model = loaded.config.model
    if not isinstance(model, ModelConfig) or model.type not in ("transformer", "encoder_decoder"):
        raise ConversionError(
            f"no architecture of transformers holds model.type={model.type}: export a run of type transformer or "
            f"encoder_decoder"
        )
    architecture, theirs = choose(model)
    make_folder(out)
    tokenizer = loaded.tokenizer
    theirs |= {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "decoder_start_token_id": tokenizer.pad_id if model.type == "encoder_decoder" else None,
        "torch_dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
    }
    _write_json(out / "config.json", theirs)
    tensors = export_weights(architecture, model, dict(loaded.model.named_parameters()))
    save_file(
        {name: tensor.detach() for name, tensor in tensors.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    shutil.copyfile(RunFolder(Path(run)).tokenizer, out / "tokenizer.model")
    _write_json(out / "tokenizer_config.json", _TOKENIZER_CONFIG)
    return architecture.class_name


@dataclass(frozen=True)
class Imported:
    """What `import_run` made a run of."""

    model: ModelConfig
    weights: Path
    """The folder that they were read from."""


def import_run(source: Path, out: Path, data_path: str, config_file: Path | None = None) -> Imported:
    """Make a run of a Hugging Face folder: a checkpoint of step 0, from which to generate, evaluate or train on.

    Where DeepSpeed saved a checkpoint in the folder, the fp32 weights in it are taken, even if weights in 16 bits lie
    beside it, as transformers' own trainer leaves them.

    config_file: the model's config.json; otherwise the folder's, or the one beside the folder of a step.

    Raises:
        ConversionError: the architecture isn't known here.
        RunError: the folder lacks something, or `out` exists.
    """
    if not source.is_dir():
        raise RunError(f"{source}: no such folder: give one that `save_pretrained` or DeepSpeed wrote")
    step = find_step(source)
    config_file = config_file or _config_file(source, step)
    architecture, model = read_config(_read_json(config_file))
    weights = _read_tensors(source) if step is None else read_weights(step)
    tensors = import_weights(architecture, model, weights)
    make_folder(out)
    folder = RunFolder(out)
    config = Config.model_validate(
        {
            "run": {"name": out.name, "dir": str(out.parent), "steps": 1000},
            "model": model.model_dump(mode="json"),
            "data": {"path": data_path},
        }
    )
    folder.config.write_text(to_yaml(config))
    for name in _TOKENIZERS:
        if (tokenizer := config_file.parent / name).is_file():
            shutil.copyfile(tokenizer, folder.tokenizer)
    named = {f"model.{name}": tensor.float() for name, tensor in tensors.items()}
    with process_group(torch.device("cpu")):
        checkpoint.save(
            folder.checkpoints, named, Progress(step=0, tokens=0, data={}), CheckpointConfig(keep=1), {}
        )
    return Imported(model, source if step is None else step)


def _config_file(source: Path, step: Path | None) -> Path:
    beside = source.parent / "config.json"
    if step == source and not (source / "config.json").is_file() and beside.is_file():
        return beside
    return source / "config.json"


def _read_tensors(source: Path) -> dict[str, Tensor]:
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise RunError(
            f"{source} has no .safetensors file: save the model with `save_pretrained`, which makes one"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return tensors


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise RunError(
            f"{path}: {error.strerror}: give a folder that `save_pretrained` wrote, or `--config` its file"
        ) from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
