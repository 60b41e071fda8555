"""How good a model is: its loss on the validation split."""

from data.mixture import open_sources
from data.stream import validation_batches
from parallel.engine import Engine
from train.config import Config


def validation_loss(engine: Engine, config: Config) -> float:
    """The mean loss over the targets of the validation split, each counted once; all ranks call it together.

    Of a mixture, the sources' mean losses, weighted by their proportions.
    """
    losses = []
    for source in open_sources(config.data):
        batches = validation_batches(
            str(source.info.path),
            config.data.micro_batch_size,
            engine.mesh.data_rank,
            engine.layout.data_size,
            limit=config.evaluation.sequences,
            inputs=config.model.inputs,
        )
        losses.append(source.proportion * engine.evaluate(batches))
    return sum(losses)
