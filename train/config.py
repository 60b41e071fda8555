"""The run's configuration: the sections of all rooms in one tree, and the checks that span several of them."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    model_validator,
)

from data.config import DataConfig
from model.config import BaseModelConfig, ModelConfig
from model.models import parse_model
from parallel.config import ActivationCheckpointConfig, CompileConfig, ParallelConfig, Precision
from slurm.config import SlurmConfig
from train.counts import parse_count
from train.duration import Seconds
from train.faults.config import FaultsConfig

Count = Annotated[float, BeforeValidator(parse_count)]


def _file_name(value: str) -> str:
    if not value or value in {".", ".."} or any(c in "/\\\0\n" for c in value):
        raise ValueError(f"{value!r} is not a folder's name: use letters, digits, '.', '_' and '-'")
    return value


class Section(BaseModel):
    """A section of the configuration: unknown keys are refused, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunConfig(Section):
    """What the run is called and how long it goes on."""

    name: Annotated[str, AfterValidator(_file_name)] = "run"
    """The run's folder is `dir`/`name`."""
    dir: str = "runs"
    """The folder that holds the runs."""
    seed: int = Field(0, ge=0)
    """Fixes the initial weights, the order of the data and every random draw."""
    steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps."""
    tokens: int | None = Field(None, ge=1)
    """Stop after this many tokens, rounded up to whole steps."""
    wall_time: Seconds | None = None
    """Save and stop after this long, such as `90m` or `1h30m`; the run can be resumed."""

    grace_time: Seconds = 120
    """How long a run that a signal asked to stop may take to finish its step and save; on Slurm the signal comes this
    long before the time limit."""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.steps is not None and self.tokens is not None:
            raise ValueError("run.steps and run.tokens are both given: keep one")
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), fused; biases and norms don't decay."""

    lr: float = Field(3e-4, gt=0)
    """The peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment, per step."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment, per step."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of linear weights and embeddings; biases, norms and relative positions don't decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class ScheduleConfig(Section):
    """The learning rate over the steps; see `train.schedule`."""

    type: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """The shape after the warm-up; `wsd` is warm-up, stable, decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    total_steps: int | None = Field(None, ge=1)
    """The step at which the decay ends; left out, the last step of the run."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where the decay ends, as a fraction of `optimizer.lr`."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """With `wsd`: the part of the steps over which the rate decays."""


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every_steps: int | None = Field(None, ge=1)
    """Save every so many steps. The last step of a run is always saved."""
    every_time: Seconds | None = None
    """Save also when so long nothing was saved, such as `30m`."""
    asynchronous: bool = False
    """Stop the loop only for a copy into the host's memory, which needs the room, and write in the background."""
    keep: int = Field(2, ge=1)
    """The newest checkpoints that are kept."""
    keep_every: int | None = Field(None, ge=1)
    """Those of every so many steps are kept for ever: a multiple of `every_steps`."""
    keep_best: int = Field(0, ge=0)
    """So many with the lowest validation loss are kept as well, of those that are evaluated at their step."""

    mirror: str | None = None
    """A folder, or a URL that fsspec reaches, where checkpoints are copied in the background, below the run's name; a
    newer one there is brought back when a run starts. The rules of what is kept hold there, too."""
    max_missed_saves: int = Field(3, ge=0)
    """A save that finds the disk full is missed: training goes on, and the next one tries again. The run ends when more
    than so many are missed in a row, or its last one."""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.keep_every is None:
            return self
        if self.every_steps is None:
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} keeps what checkpoint.every_steps saves, which is not set: "
                f"set it, such as checkpoint.every_steps={self.keep_every}"
            )
        if self.keep_every % self.every_steps:
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} is no multiple of checkpoint.every_steps="
                f"{self.every_steps}: use {(self.keep_every // self.every_steps + 1) * self.every_steps}"
            )
        return self


class MonitorConfig(Section):
    """What is shown of a run while it trains."""

    print_every_steps: int = Field(10, ge=1)
    """In a pipe or a file, a line every so many steps; in TensorBoard, histograms of the experts' load."""
    tensorboard: bool = True
    """Write TensorBoard's event files into the run folder."""


class EvaluationConfig(Section):
    """Validation and samples while training."""

    every_steps: int | None = Field(None, ge=1)
    """Evaluate on the validation split every so many steps, and after the last."""
    sequences: int | None = Field(None, ge=1)
    """Evaluate on so many sequences (of each source), evenly spread over the split; left out, on all."""
    sample_every_steps: int | None = Field(None, ge=1)
    """Generate a sample of text every so many steps."""
    sample_prompt: str = ""
    """What the sample goes on from; empty: the beginning of a document."""
    sample_tokens: int = Field(64, ge=1)
    """The sample's length in tokens."""
    sample_steps: int = Field(32, ge=1)
    """Of a flow matching model: steps from noise to a sample."""
    sample_classes: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(None, min_length=1)
    """Of a model that draws pictures of a class: the classes that are drawn, a row for each; left out, the
    first ten."""


class DialConfig(Section):
    """One number that sets the size of the model, the tokens, the batch and the learning rate; see `train.dial`."""

    params: Count | None = None
    """Parameters that a token meets, such as `300M`."""
    depth: int | None = Field(None, ge=1)
    """Layers; the width follows."""
    flops: Count | None = None
    """Compute of the whole training, such as `1e20`; alone, it sets the size too."""
    tokens_per_param: Count = 20.0
    """Tokens for each parameter, where flops and size don't say."""

    @model_validator(mode="after")
    def _check(self) -> "DialConfig":
        if self.params is not None and self.depth is not None:
            raise ValueError("dial.params and dial.depth both set the model's size: keep one")
        if self.params is None and self.depth is None and self.flops is None:
            raise ValueError("dial sets nothing: give dial.params=300M, dial.depth=16 or dial.flops=1e20")
        return self


class Config(Section):
    """The whole tree. `train.config_file` reads it from YAML; `train.resolve` fills in what depends on data."""

    run: RunConfig = RunConfig()
    model: Annotated[SerializeAsAny[BaseModelConfig], BeforeValidator(parse_model)] = ModelConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: Precision = "fp32"
    """The dtype of computation; weights and optimizer state stay in fp32 (in fp64 with fp64). fp8: bf16, and in the
    blocks' linear layers products of 8-bit floats."""
    activation_checkpoint: ActivationCheckpointConfig = ActivationCheckpointConfig()
    compile: CompileConfig = CompileConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    slurm: SlurmConfig = SlurmConfig()
    dial: DialConfig | None = Field(None, exclude=True)
    """Unset: nothing. What it sets stands in the other sections, and is what is shown and saved."""

    @model_validator(mode="after")
    def _check_best(self) -> "Config":
        if self.checkpoint.keep_best and self.evaluation.every_steps is None:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} goes by the validation loss, which is not measured: "
                f"set evaluation.every_steps={self.checkpoint.every_steps or 100}"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> "Config":
        unlimited = self.run.steps is None and self.run.tokens is None and self.dial is None
        if unlimited and self.run.wall_time is None:
            raise ValueError("the run has no end: set run.steps, run.tokens or run.wall_time")
        if unlimited and self.schedule.total_steps is None and self.schedule.type != "constant":
            raise ValueError(
                f"schedule.type={self.schedule.type} must know where it ends: set run.steps, run.tokens or "
                f"schedule.total_steps, or use schedule.type=constant"
            )
        return self

    @model_validator(mode="after")
    def _check_faults(self) -> "Config":
        if self.faults.on_spike == "rollback" and (
            self.checkpoint.every_steps is None and self.checkpoint.every_time is None
        ):
            raise ValueError(
                "faults.on_spike=rollback goes back to a checkpoint, and checkpoint.every_steps=null writes none on "
                "the way: set checkpoint.every_steps=1000, or faults.on_spike=log"
            )
        compares = self.faults.compare_every_steps
        if compares is not None and self.parallel.dp_replicate == self.parallel.tp == 1:
            raise ValueError(
                f"faults.compare_every_steps={compares}: with parallel.dp_replicate=1 and parallel.tp=1 no two ranks "
                f"hold the same weights: set faults.compare_every_steps=null, or parallel.dp_replicate=2"
            )
        return self
