"""Filling in what the data and the machine decide, and checking all of it before anything costly starts."""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import fsspec

from data.dataset import DatasetInfo, ImageCodesInfo, PairsInfo, TextInfo
from data.mixture import Source, as_one, open_sources
from data.stream import SEEDS
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.encoder_decoder.config import EncoderDecoderConfig
from model.image_codes.config import ImageCodesConfig
from parallel.errors import LayoutError
from parallel.fit import (
    check_async_tp,
    check_budget,
    check_compile,
    check_fit,
    check_fp8,
    check_micro_batches,
    check_recomputation,
)
from parallel.layout import SIZES, Layout, resolve_layout
from parallel.zero.config import library_config
from parallel.zero.fit import check_zero
from train.config import Config
from train.config_file import Loaded
from train.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """A configuration that fits its data and its processes."""

    config: Config
    """With `model.vocab_size` filled in."""
    sources: dict[str, str]
    dataset: DatasetInfo
    """Of a mixture, what its sources are together."""
    mixture: tuple[Source, ...]
    """The data set's sources: one, or those of a mixture."""
    layout: Layout

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.config.data.global_batch_size * self.dataset.seq_len

    @property
    def total_steps(self) -> int | None:
        """The run's last step, or None where only time ends it."""
        if self.config.run.tokens is not None:
            return -(-self.config.run.tokens // self.tokens_per_step)
        return self.config.run.steps

    @property
    def schedule_steps(self) -> int | None:
        """The step at which the learning rate's decay ends."""
        return self.config.schedule.total_steps or self.total_steps


def resolve(loaded: Loaded, world_size: int | None = None) -> Plan:
    """Open the data set, fill in the vocabulary, and check the sections against each other.

    `world_size` is the number of processes; left out, the launcher's, or as many as the layout wants.

    Raises:
        ConfigError, LayoutError, InputError: what doesn't fit, and what would.
    """
    mixture = open_sources(loaded.config.data)
    dataset = as_one(mixture)
    _check_inputs(loaded.config, dataset)
    config, sources = _fill_in_vocabulary(loaded, dataset)
    config, sources = _fill_in_classes(Loaded(config, sources), dataset)
    config, sources = _fill_in_source(Loaded(config, sources), dataset)
    if config.model.max_seq_len < dataset.seq_len:
        raise ConfigError(
            f"model.max_seq_len={config.model.max_seq_len} is shorter than the sequences of {dataset.path} "
            f"({dataset.seq_len} tokens): set model.max_seq_len={dataset.seq_len}, or prepare the data "
            f"with --seq-len {config.model.max_seq_len}"
        )
    _check_samples(config, dataset)
    _check_kernel(config)
    _check_mirror(config)
    layout = resolve_layout(config.parallel, world_size or wanted_world_size(config))
    check_fit(layout, config.parallel, config.model, dataset.seq_len)
    check_recomputation(layout, config.parallel, config.activation_checkpoint.mode)
    check_fp8(layout, config.parallel, config.model, config.precision)
    check_zero(layout, config.parallel, config.precision, config.compile)
    check_compile(config.compile, config.precision)
    check_async_tp(layout, config.parallel, config.compile, config.precision, config.model, dataset.seq_len)
    budget, micro_batch = config.activation_checkpoint.memory_budget, config.data.micro_batch_size
    shape = micro_batch, dataset.seq_len
    check_budget(layout, config.parallel, config.precision, config.model, budget, shape)
    _check_batch(config, layout)
    return Plan(config, sources, dataset, mixture, layout)


def wanted_world_size(config: Config) -> int:
    """The launcher's number of processes, or what the layout says, with one per GPU (one on a CPU) for -1."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    sizes = {name: getattr(config.parallel, name) for name in SIZES}
    if sizes["dp_shard"] != -1:
        return prod(sizes.values())
    import torch  # only here: it takes seconds

    return max(torch.cuda.device_count(), prod(size for name, size in sizes.items() if name != "dp_shard"))


def _check_inputs(config: Config, dataset: DatasetInfo) -> None:
    missing = set(config.model.inputs) - {*dataset.columns, SEEDS}
    if missing:
        raise ConfigError(
            f"model.type={config.model.type} takes {', '.join(sorted(missing))}, but {dataset.path} holds "
            f"{', '.join(dataset.columns)} ({dataset.kind}): choose another data.path or model.type"
        )


def _fill_in_classes(loaded: Loaded, dataset: DatasetInfo) -> tuple[Config, dict[str, str]]:
    config, model = loaded.config, loaded.config.model
    if not isinstance(model, ImageCodesConfig) or not isinstance(dataset, ImageCodesInfo):
        return config, loaded.sources
    classes = len(dataset.class_names)
    if model.class_conditional and model.num_classes is None:
        filled = config.model_copy(update={"model": model.model_copy(update={"num_classes": classes})})
        return filled, loaded.sources | {"model.num_classes": str(dataset.path)}
    if model.num_classes is not None and model.num_classes < classes:
        raise ConfigError(
            f"model.num_classes={model.num_classes} is less than the {classes} classes of {dataset.path}: leave "
            f"it out, or set at least {classes}"
        )
    return config, loaded.sources


def _fill_in_source(loaded: Loaded, dataset: DatasetInfo) -> tuple[Config, dict[str, str]]:
    config, model = loaded.config, loaded.config.model
    if not isinstance(model, EncoderDecoderConfig) or not isinstance(dataset, PairsInfo):
        return config, loaded.sources
    if model.max_source_len is None:
        update = {"max_source_len": dataset.source_len}
        filled = config.model_copy(update={"model": model.model_copy(update=update)})
        return filled, loaded.sources | {"model.max_source_len": str(dataset.path)}
    if model.max_source_len < dataset.source_len:
        raise ConfigError(
            f"model.max_source_len={model.max_source_len} is shorter than the sources of {dataset.path} "
            f"({dataset.source_len} tokens): leave it out, or prepare the data with --source-len "
            f"{model.max_source_len}"
        )
    return config, loaded.sources


def _fill_in_vocabulary(loaded: Loaded, dataset: DatasetInfo) -> tuple[Config, dict[str, str]]:
    config, model = loaded.config, loaded.config.model
    if model.vocab_size is None:
        multiple = model.vocab_size_multiple
        padded = -(-dataset.vocab_size // multiple) * multiple
        source = f"{dataset.path}: {dataset.vocab_size} rounded up to a multiple of {multiple}"
        filled = config.model_copy(update={"model": model.model_copy(update={"vocab_size": padded})})
        return filled, loaded.sources | {"model.vocab_size": source}
    if model.vocab_size < dataset.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the {dataset.vocab_size} tokens "
            f"of {dataset.path}: leave it out, or set at least {dataset.vocab_size}"
        )
    return config, loaded.sources


def _check_samples(config: Config, dataset: DatasetInfo) -> None:
    """A sample that the model can't generate would otherwise end the run when it is due."""
    settings, model = config.evaluation, config.model
    if settings.sample_every_steps is None:
        return
    if not isinstance(model, ModelConfig):
        raise ConfigError(
            f"evaluation.sample_every_steps: a model of type {model.type} generates nothing: leave it out"
        )
    parted = f"parallel.pp={config.parallel.pp}" if config.parallel.pp > 1 else ""
    if config.parallel.engine == "deepspeed" and config.parallel.deepspeed.stage == 3:
        parted = "parallel.deepspeed.stage=3"
    if parted:
        raise ConfigError(
            f"evaluation.sample_every_steps: with {parted} no rank has the whole model that would generate: leave it "
            f"out, and use `trireme generate` on the run"
        )
    refines = model.type == "flow_matching"
    if model.attention.mask_type == "bidirectional" and not refines:
        raise ConfigError(
            f"evaluation.sample_every_steps: a model of type {model.type} with "
            f"model.attention.mask_type=bidirectional generates nothing: leave it out"
        )
    if isinstance(dataset, ImageCodesInfo):
        unknown = [at for at in settings.sample_classes or () if at >= len(dataset.class_names)]
        if unknown:
            raise ConfigError(
                f"evaluation.sample_classes: there is no class {unknown[0]} in {dataset.path}: there are 0 to "
                f"{len(dataset.class_names) - 1}"
            )
    if model.positional.encoding == "learned" and isinstance(dataset, TextInfo):
        encoded = Tokenizer.load(dataset.tokenizer_path).encode(settings.sample_prompt)
        answers = isinstance(model, EncoderDecoderConfig)
        prompt = 1 if answers else len(encoded) or (0 if refines else 1)
        if prompt + settings.sample_tokens > model.max_seq_len:
            raise ConfigError(
                f"evaluation.sample_tokens={settings.sample_tokens} after a prompt of {prompt} tokens goes past the "
                f"{model.max_seq_len} learned positions: set at most {model.max_seq_len - prompt}"
            )


def _check_kernel(config: Config) -> None:
    if not isinstance(config.model, ModelConfig) or config.model.attention.kernel != "flex":
        return
    import torch  # only here: it takes seconds

    if not torch.cuda.is_available():
        raise ConfigError(
            "model.attention.kernel=flex can't train on a CPU, where it has no backward: "
            "use model.attention.kernel=auto"
        )


def _check_batch(config: Config, layout: Layout) -> None:
    micro, whole = config.data.micro_batch_size, config.data.global_batch_size
    at_once = micro * layout.data_size
    if whole % at_once:
        nearest = max(1, round(whole / at_once)) * at_once
        raise LayoutError(
            f"data.global_batch_size={whole} is not a multiple of data.micro_batch_size x data-parallel ranks "
            f"= {micro} x {layout.data_size} = {at_once}: set data.global_batch_size={nearest}, "
            f"or another micro-batch size"
        )
    check_micro_batches(config.parallel, whole // at_once)
    if config.parallel.engine == "deepspeed":
        deepspeed_config(config, layout)


def deepspeed_config(config: Config, layout: Layout) -> dict[str, Any]:
    """What DeepSpeed is given by the configuration.

    Raises:
        LayoutError: its own keys in parallel.deepspeed.config contradict the rest.
    """
    return library_config(
        config.parallel.deepspeed,
        config.precision,
        micro_batch_size=config.data.micro_batch_size,
        accumulation_steps=config.data.global_batch_size // (config.data.micro_batch_size * layout.data_size),
        max_grad_norm=config.optimizer.max_grad_norm,
    )


def _check_mirror(config: Config) -> None:
    """It can be reached from here, and isn't the folder of the runs themselves."""
    url = config.checkpoint.mirror
    if url is None:
        return
    try:
        files, root = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"checkpoint.mirror={url}: {error}; a folder works, or a URL of which fsspec knows the protocol"
        ) from None
    if "file" in files.protocol and Path(root).resolve() == Path(config.run.dir).resolve():
        raise ConfigError(
            f"checkpoint.mirror={url} is the folder of the runs themselves, run.dir={config.run.dir}: use another"
        )
