"""Runs of models that are no plain decoder: flow matching on text, pictures' codes, pairs of texts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.dataset import ImageCodesInfo, PairsInfo
from data.prepare_pairs import prepare_pairs
from data.prepare_pictures import prepare_pictures
from model.encoder_decoder.config import EncoderDecoderConfig
from model.sampling import Sampling
from parallel.processes import WorkerPool
from tests.train.running import losses, train_here
from tests.train.test_command_line import trireme
from train.cli.generate import generate
from train.config_file import load_config
from train.convert_run import export_run, import_run
from train.decoding import Refinement
from train.errors import ConfigError, RunError
from train.evaluate_run import evaluate_run, load_run
from train.resolve import resolve
from train.samples import draw_codes, make_pictures
from train.texts import TextSettings, continuations

FLOW = ["model.type=flow_matching", "model.positional.encoding=rope", "model.time_embed_dim=16"]


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> ImageCodesInfo:
    """120 pictures of 4 x 4 codes: lying stripes are class 0, standing ones 1."""
    folder = tmp_path_factory.mktemp("stripes")
    draw = np.random.default_rng(0)
    lying = draw.integers(0, 4, (60, 4, 1)).repeat(4, axis=2)
    standing = draw.integers(0, 4, (60, 1, 4)).repeat(4, axis=1)
    np.savez(folder / "codes.npz", codes=np.concatenate((lying, standing)), labels=np.arange(120) // 60)
    return prepare_pictures(str(folder / "codes.npz"), folder / "set", kind="codes", validation_fraction=0.15)


@pytest.fixture(scope="module")
def picture_run(
    stripes: ImageCodesInfo,
    pools: dict[int, WorkerPool],
    tiny_config: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run on them by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [
        f"run.dir={folder}",
        f"data.path={stripes.path}",
        "model.type=image_codes",
        "model.vocab_size_multiple=1",
        "run.steps=80",
        "data.global_batch_size=16",
        "evaluation.every_steps=40",
        "evaluation.sample_every_steps=40",
        "evaluation.sample_classes=[1,0,1]",
    ]
    pools[2].run(train_here, tiny_config, overrides)
    return folder / "run"


def test_any_number_of_processes_computes_the_same_flow(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    between = ["evaluation.every_steps=6", "evaluation.sample_every_steps=6", "evaluation.sample_tokens=8"]
    between.append("evaluation.sample_steps=4")
    common = [f"run.dir={tmp_path}", "precision=fp64", "run.steps=12", *FLOW, *between]
    pools[1].run(train_here, tiny_config, [*common, "run.name=one", "data.micro_batch_size=8"])
    pools[2].run(train_here, tiny_config, [*common, "run.name=two", "data.micro_batch_size=1"])
    for (_, loss, norm), (_, other_loss, other_norm) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True
    ):
        assert (other_loss, other_norm) == (pytest.approx(loss, rel=1e-9), pytest.approx(norm, rel=1e-9))
    one, two = (evaluate_run(str(tmp_path / name), None) for name in ("one", "two"))
    assert one.loss == pytest.approx(two.loss, rel=1e-9)


@pytest.mark.parametrize("path", ["linear", "mixture"])
def test_denoising_loss_falls_and_noise_is_refined(
    pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, path: str
) -> None:
    overrides = [f"run.dir={tmp_path}", "run.steps=120", f"model.path={path}", *FLOW]
    pools[1].run(train_here, tiny_config, overrides)
    rows = [loss for _, loss, _ in losses(tmp_path / "run")]
    assert sum(rows[-20:]) < 0.6 * sum(rows[:20])
    loaded = load_run(str(tmp_path / "run"))

    def text(seed: int) -> list[str]:
        settings = TextSettings(Refinement(4, 1.0), 12, samples=2, seed=seed)
        pieces = continuations(loaded.model, loaded.tokenizer, ["The trireme", ""], settings, loaded.device)
        return ["".join(parts) for parts in zip(*pieces, strict=True)]

    assert len(text(0)) == 4 and all(text(0))
    assert text(0) != text(1)


def test_pictures_are_learned_and_shown(picture_run: Path, stripes: ImageCodesInfo) -> None:
    rows = [loss for _, loss, _ in losses(picture_run)]
    assert rows[0] == pytest.approx(np.log(5), rel=0.2) and rows[-1] < 0.6 * rows[0]
    events = EventAccumulator(str(picture_run / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("sample")] == [40, 80]
    with Image.open(picture_run / "samples" / "step-00000080.png") as image:
        assert image.size == (8 * 64 + 7 * 2, 3 * 64 + 2 * 2), "a row of eight for each class"

    loaded = load_run(str(picture_run))
    assert isinstance(loaded.vocabulary, ImageCodesInfo)
    assert (loaded.vocabulary.digest, loaded.vocabulary.path) == (stripes.digest, picture_run)
    codes = draw_codes(
        loaded.model, loaded.vocabulary, [0, 1], 30, Sampling(temperature=0.7), 0, loaded.device
    )
    lying = (codes == codes[:, :, :1]).all(axis=2).mean(axis=1)
    assert lying[:30].mean() > 0.8 > 0.4 > lying[30:].mean(), "the class decides"
    assert (codes < 4).all()


def test_generating_pictures(picture_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, run = tmp_path / "grid.png", str(picture_run)
    generate(run, classes="1,0,1", num_samples=4, out=out)
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as image:
        assert image.size == (4 * 64 + 3 * 2, 3 * 64 + 2 * 2)
    for arguments, message in (
        ({"classes": "0"}, "pictures need a file: name it with --out"),
        ({"out": out, "classes": "0,two"}, "give numbers with commas between"),
        ({"out": out, "classes": "2"}, "there is no class 2: there are 0 to 1"),
        ({"out": out, "prompt": ["x"]}, "--prompt: .* makes pictures: leave it out"),
        ({"out": out, "stop": ["x"], "beams": 2}, "--stop and --beams: .* makes pictures: leave them out"),
        ({"out": out, "top_p": 2.0}, "top_p=2.0: it must be above 0"),
        ({"out": out, "steps": 3}, "generates token by token: leave it out"),
        ({"out": tmp_path / "no" / "grid.png"}, "can't be written"),
    ):
        with pytest.raises(RunError, match=message):
            generate(run, **arguments)


def test_pictures_without_classes(
    stripes: ImageCodesInfo, pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    common = [f"run.dir={tmp_path}", f"data.path={stripes.path}", "run.steps=2"]
    for name, model in (
        ("plain", ["model.type=transformer"]),
        ("free", ["model.type=image_codes", "model.class_conditional=false"]),
        ("flow", ["model.type=flow_matching", "model.positional.encoding=learned"]),
    ):
        overrides = [*common, *model, f"run.name={name}", "evaluation.sample_every_steps=2"]
        pools[1].run(train_here, tiny_config, overrides)
        loaded = load_run(str(tmp_path / name))
        assert isinstance(loaded.vocabulary, ImageCodesInfo)
        decoding = Refinement() if name == "flow" else Sampling()
        pixels = make_pictures(loaded.model, loaded.vocabulary, None, 3, decoding, 0, loaded.device)
        assert pixels.shape == (3 * 64 + 4, 3 * 64 + 4, 1)
        with pytest.raises(RunError, match="takes no classes"):
            make_pictures(loaded.model, loaded.vocabulary, [0], 3, decoding, 0, loaded.device)


def test_what_does_not_fit_is_refused(stripes: ImageCodesInfo, tiny_config: str) -> None:
    def fails(message: str, *overrides: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            resolve(load_config(tiny_config, overrides), world_size=1)
        assert "\n" not in str(caught.value)

    pictures = (f"data.path={stripes.path}", "model.type=image_codes")
    fails(r"model.type=image_codes takes classes, but .* holds tokens \(text\)", "model.type=image_codes")
    wanted = ("evaluation.sample_every_steps=9", "evaluation.sample_classes=[0,2]")
    fails(r"evaluation.sample_classes: there is no class 2 in .*: there are 0 to 1", *pictures, *wanted)
    fails("model.num_classes=1 is less than the 2 classes", *pictures, "model.num_classes=1")
    fails("model.vocab_size=3 is smaller than the 5 tokens", *pictures, "model.vocab_size=3")
    fails("model.type='flow_maching' is no model: did you mean 'flow_matching'", "model.type=flow_maching")
    fails(
        "unknown key 'model.time_embed_din': did you mean 'model.time_embed_dim'",
        *FLOW,
        "model.time_embed_din=2",
    )
    fails("unknown key 'model.time_embed_dim'", "model.time_embed_dim=2")
    fails("unknown key 'num_classes': did you mean 'model.num_classes'", *pictures, "num_classes=2")
    fails("model.time_embed_dim='x': input should be a valid integer", *FLOW, "model.time_embed_dim=x")
    plan = resolve(load_config(tiny_config, [*pictures, "model.vocab_size_multiple=1"]), world_size=1)
    assert plan.config.model.model_dump()["num_classes"] == 2
    assert plan.config.model.vocab_size == 5, "4 codes and the start"
    assert plan.sources["model.num_classes"] == str(stripes.path)


SHIPS = {"bow": "prora", "stern": "prymna", "oar": "kope", "ram": "embolon", "sail": "histion"}
PAIRS = ["model.type=encoder_decoder", "model.num_encoder_layers=1", "model.positional.encoding=relative"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairsInfo:
    """Of sentences of very different length, the Greek for the one word that makes a difference."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = [
        {"source": f"the {ship} {'again ' * (number % 5)}{number}", "target": greek}
        for number in range(40)
        for ship, greek in SHIPS.items()
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = {"vocab_size": 300, "source_len": 20, "seq_len": 8}
    return prepare_pairs([str(folder / "pairs.jsonl")], folder / "set", validation_fraction=0.1, **sizes)


@pytest.mark.parametrize("extra", ["activation_checkpoint.mode=full", "model.moe.num_experts=3"])
def test_any_number_of_processes_computes_the_same_pairs(
    pairs: PairsInfo, pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path, extra: str
) -> None:
    between = ["evaluation.every_steps=6", "evaluation.sample_every_steps=6", "evaluation.sample_tokens=8"]
    where = [f"run.dir={tmp_path}", f"data.path={pairs.path}"]
    common = [*where, "precision=fp64", "run.steps=12", *PAIRS, *between]
    pools[1].run(train_here, tiny_config, [*common, "run.name=one", "data.micro_batch_size=8", *moe(extra)])
    pools[2].run(train_here, tiny_config, [*common, "run.name=two", "data.micro_batch_size=1", extra])
    for (_, loss, norm), (_, other_loss, other_norm) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True
    ):
        assert (other_loss, other_norm) == (pytest.approx(loss, rel=1e-9), pytest.approx(norm, rel=1e-9))
    one, two = (evaluate_run(str(tmp_path / name), None) for name in ("one", "two"))
    assert one.loss == pytest.approx(two.loss, rel=1e-9)


def moe(extra: str) -> list[str]:
    """What changes the model, and not only how it is computed."""
    return [extra] if extra.startswith("model.") else []


def test_pairs_are_learned_and_answered(
    pairs: PairsInfo,
    pools: dict[int, WorkerPool],
    tiny_config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sampled = ["evaluation.sample_every_steps=150", "evaluation.sample_prompt=the ram again 7"]
    overrides = [f"run.dir={tmp_path}", f"data.path={pairs.path}", "run.steps=150", *PAIRS, *sampled]
    pools[2].run(train_here, tiny_config, overrides)
    rows = [loss for _, loss, _ in losses(tmp_path / "run")]
    assert rows[-1] < 0.2 < 3 < rows[0]
    loaded = load_run(str(tmp_path / "run"))
    assert isinstance(loaded.config.model, EncoderDecoderConfig) and loaded.config.model.max_source_len == 20
    for ship, greek in SHIPS.items():
        prompt = f"the {ship} again 41"
        generate(str(tmp_path / "run"), prompt=[prompt], temperature=0.0, max_new_tokens=8)
        assert capsys.readouterr().out == f"{greek}\n"
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (sample,) = events.Tensors("sample/text_summary")
    assert b"embolon" in sample.tensor_proto.string_val[0]


def test_pairs_to_hugging_face_and_back(
    pairs: PairsInfo, pools: dict[int, WorkerPool], tiny_config: str, tmp_path: Path
) -> None:
    t5 = ["model.attention.num_kv_heads=4", "model.ffn.variant=geglu_tanh", "model.tie_embeddings=false"]
    overrides = [f"run.dir={tmp_path}", f"data.path={pairs.path}", "run.steps=2", *PAIRS, *t5]
    pools[1].run(train_here, tiny_config, overrides)
    assert export_run(str(tmp_path / "run"), tmp_path / "hf") == "T5ForConditionalGeneration"
    import_run(tmp_path / "hf", tmp_path / "back", str(pairs.path))
    one, other = (load_run(str(tmp_path / name)) for name in ("run", "back"))
    source, tokens = torch.randint(256, (2, 9)), torch.randint(256, (2, 5))
    torch.testing.assert_close(other.model(source, tokens), one.model(source, tokens))

    from transformers import T5ForConditionalGeneration

    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    expected = theirs(input_ids=source, decoder_input_ids=tokens).logits
    torch.testing.assert_close(one.model(source, tokens), expected, atol=1e-4, rtol=1e-4)
    assert theirs.config.decoder_start_token_id == pairs.pad_id


def test_pairs_that_do_not_fit_are_refused(pairs: PairsInfo, tiny_config: str) -> None:
    for message, overrides in (
        (r"takes source, source_padding, but .* holds tokens \(text\)", []),
        (
            "model.max_source_len=9 is shorter than the sources",
            [f"data.path={pairs.path}", "model.max_source_len=9"],
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(load_config(tiny_config, [*PAIRS, *overrides]), world_size=1)


@pytest.mark.slow
def test_generated_digits_are_recognized(tmp_path: Path) -> None:
    """Trained on scikit-learn's handwritten digits as a user would: the class asked for is what a classifier sees."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    from data.codebook import Codebook

    digits = load_digits()
    np.savez(tmp_path / "digits.npz", images=digits.images / 16, labels=digits.target)
    prepare = ("prepare", "--kind", "images", "--source", "digits.npz", "--out", "datasets/digits")
    trireme(*prepare, "--patch-size", "2", "--codebook-size", "256", cwd=tmp_path)
    trireme("train", "digits", cwd=tmp_path)

    loaded = load_run(str(tmp_path / "runs" / "digits"))
    assert isinstance(loaded.vocabulary, ImageCodesInfo)
    codes = draw_codes(loaded.model, loaded.vocabulary, range(10), 50, Sampling(), 0, loaded.device)
    pictures = Codebook.load(loaded.vocabulary.codebook_path).decode(codes)
    classifier = SVC(gamma=0.25).fit(digits.images.reshape(-1, 64) / 16, digits.target)
    recognized = classifier.predict(pictures.reshape(-1, 64) / 255) == np.repeat(np.arange(10), 50)
    # measured: 95 % of all, at least 84 % of each
    assert recognized.mean() >= 0.8
    assert (recognized.reshape(10, 50).mean(axis=1) >= 0.6).all()
    assert len(np.unique(codes.reshape(500, -1), axis=0)) > 400, "not the same few again and again"
