"""Reading configurations: extends, overrides, provenance, and one helpful line for every mistake."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config_file import CONFIGS, all_configs, all_keys, load_config
from train.errors import ConfigError
from train.run_folder import to_yaml

BASE = "run: {steps: 5}\ndata: {path: somewhere}\n"


@pytest.fixture
def write(tmp_path: Path):
    """Write a configuration file; returns its path."""

    def to_file(text: str, name: str = "config.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return to_file


def test_later_wins(write) -> None:
    write(BASE + "optimizer: {lr: 0.1, eps: 1e-6}\n", "parent.yaml")
    child = write("extends: parent.yaml\noptimizer:\n  lr: 0.2\n")
    loaded = load_config(child, ["optimizer.weight_decay=0"])
    optimizer = loaded.config.optimizer
    assert (optimizer.lr, optimizer.eps, optimizer.weight_decay) == (0.2, 1e-6, 0.0)
    assert loaded.sources["optimizer.lr"].endswith("config.yaml:3")
    assert loaded.sources["optimizer.eps"].endswith("parent.yaml:3")
    assert loaded.sources["optimizer.weight_decay"] == "command line"
    assert "optimizer.beta1" not in loaded.sources


def test_extends_a_preset_by_name(write) -> None:
    loaded = load_config(write("extends: tiny\n" + BASE))
    assert (loaded.config.model.d_model, loaded.config.model.num_layers) == (256, 4)
    assert loaded.sources["model.d_model"].startswith("configs/presets/tiny.yaml:")


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_numbers_with_exponents_are_numbers(write, text: str) -> None:
    assert load_config(write(BASE), [f"optimizer.lr={text}"]).config.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.atention.num_heads=4"], r"unknown key 'model.atention': did you mean 'model.attention'\?"),
        (["num_layers=4"], r"unknown key 'num_layers': did you mean 'model.num_layers'\?"),
        (["optimizer.learning_speed=4"], r"unknown key 'optimizer.learning_speed': known here are lr, beta1"),
        (["model.num_layers=many"], "model.num_layers='many': input should be a valid integer"),
        (["model.num_layers=0"], "model.num_layers=0: input should be greater than"),
        (["precision=fp12"], "precision='fp12': input should be 'fp32', 'bf16'"),
        (["optimizer.lr"], "'optimizer.lr' is not of the form key.path=value"),
        (["optimizer.lr=[1"], "is not valid YAML"),
        (["run.tokens=10", "run.steps=5"], "run.steps and run.tokens are both given: keep one"),
        (["run.steps=null"], "the run has no end: set run.steps"),
        (["run.steps=null", "run.wall_time=1h"], "schedule.type=cosine must know where it ends"),
        (["run.name=../up"], "'../up' is not a folder's name"),
        (["run.wall_time=soon"], "'soon' is not a duration: write 90m"),
        (["checkpoint.keep_every=9"], "which is not set: set it, such as checkpoint.every_steps=9"),
        (["checkpoint.every_steps=4", "checkpoint.keep_every=9"], "no multiple of .*every_steps=4: use 12"),
        (["checkpoint.keep_best=1"], "not measured: set evaluation.every_steps=100"),
        (["checkpoint.every_time=never"], "'never' is not a duration"),
        (["model.attention.window_size=8"], "model.attention.window_size"),
        (["model.attention.num_heads=7"], "model.attention.num_heads"),
        (
            ["model.moe.num_expert=4"],
            r"unknown key 'model.moe.num_expert': did you mean 'model.moe.num_experts'\?",
        ),
        (["model.moe.top_k=9"], "model.moe.top_k=9 exceeds model.moe.num_experts=8: use model.moe.top_k=2"),
        (["data.micro_batch_size=3"], "data.global_batch_size"),
        (["model=7"], "model=7: input should be"),
    ],
)
def test_mistakes_are_told_in_one_line(write, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(BASE), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected sections"),
        ("- a\n", "expected sections"),
        ("run: {steps: 5\n", "not valid YAML"),
        ("extends: nowhere\n" + BASE, "there is no configuration 'nowhere'"),
        ("extends: config.yaml\n" + BASE, "extends itself"),
        ("run: {steps: 5}\n", "'data' is missing"),
        ("run: {steps: 5}\ndata: {}\n", "'data.path' is missing"),
        ("? [1, 2]\n: 3\n", "config.yaml"),
        ("run: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_broken_files_are_told_in_one_line(write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(text))
    assert "\n" not in str(caught.value)


def test_line_of_a_mistake_in_a_file(write) -> None:
    with pytest.raises(ConfigError, match=r"config.yaml:4: unknown key 'optimizer.lrr'"):
        load_config(write(BASE + "optimizer:\n  lrr: 1\n"))


def test_missing_file_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"there is no configuration 'tinny': did you mean 'tiny'\?"):
        load_config("tinny")


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_a_line_and_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("path", all_configs(), ids=lambda path: path.stem)
def test_every_config_of_the_project_loads(path: Path) -> None:
    load_config(str(path), ["run.steps=5", "data.path=anywhere"])
    assert path.read_text().startswith("# "), "the first line says what it is, for `trireme config list`"


@pytest.mark.parametrize(
    ("name", "shape"),
    {"tiny": (256, 4, 4, 1024), "small": (768, 12, 12, 3072), "medium": (1024, 24, 16, 4096)}.items(),
)
def test_presets_have_their_documented_shapes(name: str, shape: tuple[int, ...]) -> None:
    model = load_config(
        str(CONFIGS / "presets" / f"{name}.yaml"), ["run.steps=5", "data.path=x"]
    ).config.model
    assert (model.d_model, model.num_layers, model.attention.num_heads, model.ffn.d_ff) == shape


def test_what_a_run_writes_down_reads_back(write, tmp_path: Path) -> None:
    config = load_config(write("extends: small\n" + BASE), ["run.wall_time=90m"]).config
    assert load_config(write(to_yaml(config), "again.yaml")).config == config
    assert config.run.wall_time == 5400
    assert yaml.safe_load(to_yaml(config))["model"]["d_model"] == 768


def test_all_keys_are_documented() -> None:
    from pydantic import BaseModel

    from model.models import MODELS, config_class
    from train.config import Config

    def undocumented(section: type[BaseModel]) -> list[str]:
        missing = []
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                missing += undocumented(field.annotation)
            elif not field.description:
                missing.append(f"{section.__name__}.{name}")
        return missing

    assert undocumented(Config) == []
    assert {"model.attention.num_heads", "model.moe.num_experts"} <= set(all_keys(Config))
    for model_type in MODELS:
        assert undocumented(config_class(model_type)) == []


FLOW = """
model:
  type: "FlowMatchingTransformer"  # or "GPTCausal"
  vocab_size: 50304
  n_embd: 768
  n_layer: 12
  n_head: 12
  dropout: 0.1
  max_seq_len: 512
"""


def test_other_spellings_are_ours_with_their_places(write) -> None:
    loaded = load_config(write(BASE + FLOW), ["model.n_layer=2"])
    model = loaded.config.model
    assert (model.type, model.d_model, model.num_layers, model.max_seq_len) == ("flow_matching", 768, 2, 512)
    places = {
        key: loaded.sources[f"model.{key}"].partition("config.yaml:")[2] for key in ("d_model", "dropout")
    }
    assert places == {"d_model": "7", "dropout": "10"}
    assert loaded.sources["model.attention.num_heads"].endswith("config.yaml:9")
    assert loaded.sources["model.num_layers"] == "command line"
    assert loaded.sources["model.type"].endswith("config.yaml:5 (FlowMatchingTransformer)")
    assert loaded.sources["model.ffn.activation"].endswith("config.yaml:5 (FlowMatchingTransformer)")
    assert "model.n_embd" not in loaded.sources


def test_another_spelling_overrides_a_preset(write) -> None:
    loaded = load_config(write("extends: tiny\n" + BASE + "model: {n_embd: 64, n_head: 2, block_size: 32}\n"))
    assert (loaded.config.model.d_model, loaded.config.model.max_seq_len) == (64, 32)
    again = load_config(write(to_yaml(loaded.config), "again.yaml"), ["model.type=GPTCausal"]).config.model
    assert again == loaded.config.model, "all of it had been said"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "model: {d_model: 64,\n  n_embd: 32}\n",
            [],
            "config.yaml:3: model.d_model=64 and .*config.yaml:4: model.n_embd=32 contradict each other",
        ),
        (
            "",
            ["model.n_head=2", "model.attention.num_heads=4"],
            "^model.n_head=2 and model.attention.num_heads=4",
        ),
        ("model: {norm_type: batchnorm}\n", [], "config.yaml:3: model.norm_type='batchnorm' is not known"),
        ("model: {n_embbd: 64}\n", [], r"unknown key 'model.n_embbd': did you mean 'model.n_embd'\?"),
        ("", ["n_embd=64"], r"unknown key 'n_embd': did you mean 'model.n_embd'\?"),
        (
            "model:\n  n_embd: wide\n",
            [],
            "config.yaml:4: model.d_model='wide': input should be a valid integer",
        ),
        (
            "model: {type: GPTCausal, n_embd: 64}\n",
            [],
            "num_heads=12 does not divide model.d_model=64: use 8",
        ),
    ],
)
def test_mistakes_in_other_spellings(write, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(BASE + text), overrides)
    assert "\n" not in str(caught.value)
