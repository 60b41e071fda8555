"""The reference systems' own YAML, as it stands in their documents, trains."""

from pathlib import Path

import pytest

from parallel.processes import WorkerPool
from tests.model.test_spellings import MODULAR
from tests.train.running import losses, train_here
from tests.train.test_config_file import FLOW
from train.config_file import load_config

SECTIONS = {
    "flow": FLOW,
    "causal": FLOW.replace("FlowMatchingTransformer", "GPTCausal"),
    "modular": "model:\n"
    + "".join(f"  {key}: {value}\n" for key, value in MODULAR.items() if key != "vocab_size"),
}
SMALLER = ["model.n_embd=32", "model.n_layer=2", "model.n_head=4", "model.dropout=0.0"]


@pytest.mark.parametrize("name", SECTIONS)
def test_their_yaml_trains(name: str, pools: dict[int, WorkerPool], dataset: Path, tmp_path: Path) -> None:
    """Smaller by their own keys on the command line, where their size would take minutes."""
    path = tmp_path / "theirs.yaml"
    path.write_text(
        f"run: {{dir: {tmp_path}, steps: 30}}\ndata: {{path: {dataset}, micro_batch_size: 8, num_workers: 0}}\n"
        f"optimizer: {{lr: 0.01}}\nschedule: {{type: constant, warmup_steps: 5}}\n{SECTIONS[name]}"
    )
    smaller = SMALLER if name == "modular" else [*SMALLER, "model.vocab_size=512"]
    pools[1].run(train_here, str(path), smaller)
    rows = [loss for _, loss, _ in losses(tmp_path / "run")]
    assert sum(rows[-5:]) < 0.8 * sum(rows[:5])
    written = load_config(str(tmp_path / "run" / "config.yaml")).config.model
    assert (written.d_model, written.num_layers) == (32, 2)
    assert written.type == ("flow_matching" if name == "flow" else "transformer")
