"""One run in one process of the group: puts engine, data, monitor and loop together."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.stream import TrainingStream
from model.build import build_model
from model.count import flops_per_token
from parallel.engine import Engine, EngineConfig
from parallel.engines import make_engine
from parallel.hardware import peak_flops
from train import checkpoint, checkpoint_folder
from train.agree import on_first_rank
from train.checkpoint_folder import Progress
from train.config import Config
from train.evaluate import validation_loss
from train.faults.health import Health
from train.faults.memory import out_of_memory
from train.faults.record import FaultRecord
from train.faults.replicas import differing_ranks
from train.faults.stragglers import slow_ranks
from train.faults.watchdog import Watchdog
from train.mirror import Mirror
from train.monitor import Monitor, Newest, make_monitor
from train.optimizer import make_optimizer
from train.order_digest import OrderDigest
from train.resolve import Plan
from train.run_folder import RunFolder, check_same_run, drop_metrics_after, folder_of, to_yaml
from train.samples import make_sample
from train.saver import Saver
from train.stop import Stop
from train.trainer import Hooks, Trainer

log = logging.getLogger(__name__)


def run(plan: Plan, device: torch.device, listen: Callable[[], Stop] = Stop) -> int:
    """Train to the end that the plan sets, from the newest checkpoint if there is one.

    Called in every process of an initialized group, on a folder that `run_folder.create` made. `listen` is called
    when training begins, and notes what asks it to stop.
    Returns the last step.

    Raises:
        Stopped: asked to stop before the end, and saved.
        GaveUp: something is wrong with the run.
        OutOfMemory: this rank's device has no memory left.
    """
    config, folder = plan.config, folder_of(plan.config)
    first = dist.get_rank() == 0
    engine = engine_of(plan, device)
    stream = TrainingStream(
        config.data, config.run.seed, engine.mesh.data_rank, plan.layout.data_size, config.model.inputs
    )
    for shard in stream.bad_shards:
        log.warning("left out: %s", shard)
    mirror = _mirror(plan, folder)
    progress = _resume(folder, mirror, engine, stream)
    start = progress.step
    _announce(plan, engine, start)
    on_first_rank(lambda: drop_metrics_after(folder, start), f"{folder.metrics} can't be written")
    monitor = make_monitor(folder, plan, start) if first else Monitor([])
    saver = Saver(folder.checkpoints, config.checkpoint, _origin(plan), mirror)
    health = Health(config.faults, progress.faults)
    watchdog = Watchdog(config.faults.hang_timeout, dist.get_rank(), start, folder.log_of(dist.get_rank()))
    trainer = Trainer(
        plan,
        engine,
        stream,
        monitor,
        _make_hooks(plan, saver, mirror, engine, stream, monitor, health, watchdog),
        OrderDigest(engine.mesh.sum_over_data, device, progress.data_order_digest),
        health,
        flops_per_token=flops_per_token(config.model, plan.dataset.seq_len),
        peak_flops=peak_flops(device, config.precision),
        start=start,
    )
    try:
        last = trainer.train(listen())
        saver.wait_for_mirror()
        return last
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, config, plan.layout, device, trainer.step) from None
    finally:
        watchdog.close()
        monitor.close()
        stream.close()
        saver.close()


def _announce(plan: Plan, engine: Engine, start: int) -> None:
    """Say what begins."""
    config = plan.config
    with torch.device("meta"):
        log.info("%s: %s", folder_of(config).path, repr(build_model(config.model)).partition("\n")[0])
    log.info(
        "%d process(es), %s, %s; %s tokens a step, %s",
        dist.get_world_size(),
        plan.layout,
        config.precision,
        f"{plan.tokens_per_step:,}",
        f"from step {start + 1} to {plan.total_steps or 'the end of its time'}",
    )
    if engine.budgeted is not None:
        log.info("recomputation: %s", engine.budgeted)


def engine_of(plan: Plan, device: torch.device) -> Engine:
    """The engine of the configuration, with initial weights."""
    settings = engine_config(plan.config, plan.dataset.seq_len)
    make = partial(make_optimizer, config=plan.config.optimizer)
    return make_engine(settings, plan.layout, device, make)


def engine_config(config: Config, seq_len: int) -> EngineConfig:
    """What an engine is told of a run's configuration, and of its data the length of sequences, in tokens."""
    return EngineConfig(
        config.model,
        config.parallel,
        config.precision,
        config.activation_checkpoint,
        config.compile,
        micro_batch_size=config.data.micro_batch_size,
        global_batch_size=config.data.global_batch_size,
        seq_len=seq_len,
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.run.seed,
    )


def _mirror(plan: Plan, folder: RunFolder) -> Mirror | None:
    """The run's second place for checkpoints, ready to be written to: on rank 0, if it has one."""
    config = plan.config.checkpoint
    if config.mirror is None:
        return None
    mirror = Mirror(config.mirror, folder, config) if dist.get_rank() == 0 else None

    def start() -> None:
        assert mirror is not None
        mirror.start(lambda there, called: check_same_run(there, plan, called))

    on_first_rank(start, f"checkpoint.mirror={config.mirror} can't be used")
    return mirror


def _resume(folder: RunFolder, mirror: Mirror | None, engine: Engine, stream: TrainingStream) -> Progress:
    """Load the newest checkpoint into engine and stream. Returns where it stands; at step 0 where there is none."""
    path = _newest_checkpoint(folder, mirror)
    if path is None:
        return Progress(0, 0, {})
    progress = checkpoint_folder.load_progress(path)
    imported = progress.step == 0  # weights, and nothing of a training
    engine.restore(lambda tensors: checkpoint.load_tensors(path, tensors), weights_only=imported)
    if imported:
        return progress
    log.debug("loaded %s", path)
    stream.load_state_dict(progress.data)
    return progress


def _newest_checkpoint(folder: RunFolder, mirror: Mirror | None) -> Path | None:
    """The newest undamaged one, as rank 0 finds it, on all ranks; what a kill left unfinished is removed.

    Where the mirror has a newer one, that is brought back first.
    """

    def find() -> Path | None:
        checkpoint_folder.clean_up(folder.checkpoints, log)
        own = checkpoint_folder.latest(folder.checkpoints, log)
        if mirror is None:
            return own
        newer = mirror.bring_back(after=-1 if own is None else checkpoint_folder.step_of(own))
        mirror.send()
        return newer or own

    return on_first_rank(find, f"{folder.checkpoints} can't be read")


def _origin(plan: Plan) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run that wrote it."""
    config = plan.config
    return {
        "engine": config.parallel.engine,
        "layout": asdict(plan.layout),
        "config_sha256": hashlib.sha256(to_yaml(config).encode()).hexdigest(),
    }


def _make_hooks(
    plan: Plan,
    saver: Saver,
    mirror: Mirror | None,
    engine: Engine,
    stream: TrainingStream,
    monitor: Monitor,
    health: Health,
    watchdog: Watchdog,
) -> Hooks:
    config, folder = plan.config, folder_of(plan.config)
    newest = Newest()  # hears of steps on rank 0, which writes down what it knows
    monitor.listeners.append(newest)

    def save(step: int, data_order_digest: str) -> None:
        at = stream.state_dict()
        progress = Progress(step, step * plan.tokens_per_step, at, data_order_digest, faults=health.state())
        if (told := newest.metrics) is not None:
            progress = replace(progress, loss=told.loss, validation_loss=told.validation_loss)
        saver.save(engine.state(), progress)

    def sample(step: int) -> None:
        made = make_sample(engine.model, plan.dataset, config.evaluation, config.run.seed, engine.device)
        monitor.sample(step, made)

    record = FaultRecord(folder.faults, engine.mesh.data_rank)

    def roll_back(position: dict[str, Any]) -> Progress | None:
        saver.wait()
        path = _newest_checkpoint(folder, mirror)
        progress = None if path is None else checkpoint_folder.load_progress(path)
        if path is None or progress is None or progress.step == 0:
            return None
        engine.restore(lambda tensors: checkpoint.load_tensors(path, tensors))
        stream.load_state_dict(position)
        if dist.get_rank() == 0:
            monitor.close()
            drop_metrics_after(folder, progress.step)
            monitor.listeners = [*make_monitor(folder, plan, progress.step).listeners, newest]
        return progress

    return Hooks(
        save,
        evaluate=lambda: validation_loss(engine, config),
        sample=sample,
        record=record.write,
        roll_back=roll_back,
        differing_ranks=lambda: differing_ranks(engine),
        slow_ranks=partial(slow_ranks, engine.device),
        missed_saves=lambda: saver.missed,
        saved=saver.finish,
        check=saver.check,
        step_ended=watchdog.beat,
    )
