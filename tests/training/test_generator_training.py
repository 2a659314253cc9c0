"""Training a generator from token stores: what it reads, writes, resumes and refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import Tensor

import smalto
from smalto.autoencoders import SimpleAutoencoderConfig
from smalto.core import distributed
from smalto.core.errors import ConfigError, DataError, InputError, RunError
from smalto.generator import Generator, GeneratorConfig, Transformer
from smalto.quantizers import (
    MultiScaleVQConfig,
    ProductVQConfig,
    QuantizerConfig,
    ResidualVQConfig,
    VectorQuantizerConfig,
)
from smalto.store.schema import StoreHeader, TokenRow, row_id
from smalto.store.token_store import TokenStore
from smalto.tokenizer import ImageTokenizer, TokenizerConfig
from smalto.training.generator_recipe import GeneratorRecipe
from smalto.training.generator_task import GeneratorTask
from smalto.training.optimization import linear_schedule
from smalto.training.run_folder import read_jsonl
from smalto.training.training_tokens import TrainingTokens
from tests.conftest import smalto_command
from tests.contract.test_processes import in_processes, join

VECTOR = VectorQuantizerConfig(codebook_size=16, latent_dim=8)
QUANTIZERS: dict[str, QuantizerConfig] = {
    "multiscale": MultiScaleVQConfig(scales=[1, (2, 3), (4, 6)], scale=VECTOR),
    "vector": VECTOR,
    "residual": ResidualVQConfig(num_stages=2, stage=VECTOR),
    "product": ProductVQConfig(
        num_heads=2, head=VectorQuantizerConfig(codebook_size=16, latent_dim=4)
    ),
}
SIZE = 16, 24
SETTINGS = {
    "steps": 6,
    "data.batch": 8,
    "generator.depth": 2,
    "generator.width": 16,
    "generator.num_heads": 2,
    "checkpoint.every": 2,
    "checkpoint.keep": 9,
    "evaluate.every": 3,
    "evaluate.rows": 6,
    "evaluate.samples": 0,
    "optimizer.lr": 0.01,
    "optimizer.ema_decay": 0.9,
}
LABELS = ("cat", "dog", "owl")


def make_tokenizer(kind: str = "multiscale", seed: int = 0) -> ImageTokenizer:
    torch.manual_seed(seed)
    config = TokenizerConfig(
        autoencoder=SimpleAutoencoderConfig(latent_dim=8, hidden_dim=8), quantizer=QUANTIZERS[kind]
    )
    tokenizer: ImageTokenizer = config.build()
    return tokenizer


def make_store(
    folder: Path,
    tokenizer: ImageTokenizer,
    images: Sequence[int] = range(40),
    views: Sequence[str] = ("", "flip"),
    labels: Sequence[str] = LABELS,
    source: str = "",
) -> Path:
    """Write a store of tokens that follow from the label."""
    tokenizer.save(folder / "tokenizer-of-store") if not (
        folder / "tokenizer-of-store"
    ).exists() else None
    layout = tokenizer.layout(*SIZE)
    path = folder / "tokens.lance"
    header = StoreHeader.of(tokenizer.identity(), layout=layout, source=source)
    store = TokenStore.create(path, header)
    rows = []
    for image in images:
        random = numpy.random.default_rng(image)
        number = image % 3
        for view in views:
            tokens = (random.integers(0, 3, layout.num_tokens) + 5 * number) % 16
            label = labels[number] if labels else ""
            rows.append(TokenRow(row_id(f"{label}/{image}.png", view), tokens, label=label))
    store.append(rows)
    return path


def recipe_for(folder: Path, **changes: Any) -> GeneratorRecipe:
    settings = SETTINGS | {"data.tokenizer": str(folder / "tokenizer-of-store")}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return smalto.load_recipe(generator_toml(folder), settings)


def generator_toml(folder: Path) -> Path:
    path = folder / "generator.toml"
    if not path.exists():
        path.write_text('kind = "generator"\n')
    return path


def weights(run: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / "model.safetensors")


def equal(own: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path, make_tokenizer())


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_kind_of_tokenizer_gets_a_generator(kind: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, make_tokenizer(kind))
    recipe = recipe_for(tmp_path, steps=40, evaluate__samples=1)
    trained = smalto.train(path, recipe, out=tmp_path / "run")
    metrics = trained.metrics
    assert metrics is not None
    assert metrics.held_out.loss < metrics.uniform
    generator = smalto.load_generator(tmp_path / "run")
    assert generator.config.class_names == LABELS
    assert generator.generate([0, 2], seeds=[1, 2]).images.shape == (2, 3, *SIZE)
    assert smalto.load(tmp_path / "run").fingerprint() == make_tokenizer(kind).fingerprint()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "owl" in page
    assert "histogram by position" in page
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert len(log) == 40
    assert {"loss", "accuracy", "held_out_loss", "held_out_accuracy"} <= log[-1].keys()
    assert ("loss_grid_2" in log[-1]) == (kind != "vector")


def test_the_report_names_the_authors(tmp_path: Path) -> None:
    path = make_store(tmp_path, make_tokenizer(), source="emoji")
    smalto.train(path, recipe_for(tmp_path, steps=2), out=tmp_path / "run")
    assert "Twemoji, Twitter and other contributors" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("label_drop", [0.1, 1.0])
def test_validation_keeps_every_label(store: Path, tmp_path: Path, label_drop: float) -> None:
    recipe = recipe_for(tmp_path, optimizer__ema_decay=0.0, generator__label_drop=label_drop)
    trained = smalto.train(store, recipe, out=tmp_path / "run")
    generator = trained.generator
    rows = TrainingTokens.open(store, recipe).some_held_out_rows(6)
    blocks = list(rows.tokens.split(generator.config.layout.lengths, dim=1))
    with torch.no_grad():
        logits = generator(rows.labels, generator.tokenizer.idxBl_to_var_input(blocks))
    chances = logits.double().softmax(-1).gather(2, rows.tokens[..., None])[..., 0]
    last = read_jsonl(tmp_path / "run" / "log.jsonl")[-1]
    assert last["held_out_loss"] == pytest.approx(float(-chances.log().mean()), rel=1e-5)
    hits = (logits.argmax(-1) == rows.tokens).double()
    assert last["held_out_accuracy"] == pytest.approx(float(hits.mean()), rel=1e-5)
    start = 0
    for number, length in enumerate(generator.config.layout.lengths, start=1):
        part = chances[:, start : start + length].log()
        assert last[f"held_out_loss_grid_{number}"] == pytest.approx(float(-part.mean()), rel=1e-5)
        start += length


def test_the_baselines_are_those_of_a_count_by_hand(store: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    trained = smalto.train(store, recipe, out=tmp_path / "run")
    tokens = TrainingTokens.open(store, recipe)
    rows = TokenStore.open(store).rows()["tokens"].numpy()
    baselines = json.loads((tmp_path / "run" / "baselines.json").read_text())
    losses = []
    for row in tokens.some_held_out_rows(6).tokens.numpy():
        for position, token in enumerate(row):
            count = (rows[tokens.training, position] == token).sum()
            total = len(tokens.training) + 16 * baselines["smoothing"]
            losses.append(-math.log((count + baselines["smoothing"]) / total))
    assert trained.metrics is not None
    assert trained.metrics.histogram.loss == pytest.approx(numpy.mean(losses), rel=1e-5)
    assert trained.metrics.uniform == math.log(16)


def test_views_of_an_image_are_on_one_side(store: Path, tmp_path: Path) -> None:
    tokens = TrainingTokens.open(store, recipe_for(tmp_path))
    ids = TokenStore.open(store).ids()
    sides = [{ids[i].split("?")[0] for i in rows} for rows in (tokens.training, tokens.held_out)]
    assert len(sides[0]) + len(sides[1]) == 40
    assert not sides[0] & sides[1]
    assert sides[1]


def test_a_killed_run_resumes_bitwise(store: Path, tmp_path: Path) -> None:
    settings = {"generator__dropout": 0.2, "generator__drop_path": 0.2, "precision": "bf16"}
    recipe = recipe_for(tmp_path, steps=12, **settings)  # more than one epoch
    smalto.train(store, recipe, out=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in range(6, 13, 2):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    for name in ("metrics.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    trained = smalto.resume(tmp_path / "run")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("run", "whole")]
    assert logs[0] == logs[1]
    assert trained.metrics is not None
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_a_batch_in_parts_and_recomputed_is_the_batch(store: Path, tmp_path: Path) -> None:
    for number, parts in enumerate((1, 2)):
        changes = {"optimizer__accumulate": parts, "gradient_checkpointing": parts == 2}
        smalto.train(store, recipe_for(tmp_path, **changes), out=tmp_path / str(number))
    other = weights(tmp_path / "1")
    for name, tensor in weights(tmp_path / "0").items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


def test_a_batch_is_the_same_on_any_number_of_ranks(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path)
    tokens = TrainingTokens.open(store, recipe)
    whole = [next(tokens.batches(recipe)) for _ in range(1)]
    parts = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(next(tokens.batches(recipe)))
    assert torch.equal(whole[0].tokens, torch.cat([part.tokens for part in parts]))
    assert torch.equal(whole[0].labels, torch.cat([part.labels for part in parts]))


def test_an_epoch_trains_on_every_row_but_the_last_ones(store: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    tokens = TrainingTokens.open(store, recipe)
    batches = tokens.batches(recipe)
    number = len(tokens.training) // 8
    seen = torch.cat([next(batches).tokens for _ in range(number)]).tolist()
    rows = TokenStore.open(store).rows()["tokens"][tokens.training].tolist()
    assert len(seen) == number * 8
    assert all(seen.count(row) <= rows.count(row) for row in seen)


def test_shard_stores_are_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    whole = make_store(tmp_path, tokenizer)
    shards = tmp_path / "shards"
    for number, images in enumerate((range(13), range(13, 40))):
        shards.mkdir(exist_ok=True)
        path = make_store(shards, tokenizer, images)
        path.rename(shards / f"{number}.lance")
    recipe = recipe_for(tmp_path)
    smalto.train(whole, recipe, out=tmp_path / "whole-run")
    smalto.train(shards, recipe, out=tmp_path / "run")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole-run"))
    smalto.train([shards / "0.lance", shards / "1.lance"], recipe, out=tmp_path / "list-run")
    assert equal(weights(tmp_path / "list-run"), weights(tmp_path / "whole-run"))
    other = make_store(tmp_path / "other", make_tokenizer(seed=1))
    with pytest.raises(InputError, match="stores of one kind"):
        smalto.train([whole, other], recipe, out=tmp_path / "no")
    with pytest.raises(DataError, match="none in it"):
        smalto.train(tmp_path / "whole-run", recipe, out=tmp_path / "no")


def test_runs_on_several_stores_resume(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    first = make_store(tmp_path, tokenizer, range(13))
    second = make_store(tmp_path / "second", tokenizer, range(13, 40))
    smalto.train([first, second], recipe_for(tmp_path), out=tmp_path / "run")
    smalto.resume(tmp_path / "run", settings={"steps": 7})
    with pytest.raises(RunError, match="start a new run"):
        smalto.resume(tmp_path / "run", [second, first], settings={"steps": 8})


def test_rows_that_are_added_later_change_no_run(store: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, steps=12)
    smalto.train(store, recipe, out=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in range(6, 13, 2):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    more = [TokenRow(f"cow/{i}.png", numpy.zeros(31, numpy.int64), label="cow") for i in range(9)]
    TokenStore.open(store).append(more)
    smalto.resume(tmp_path / "run")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_other_rows_are_refused_and_leave_the_run_alone(store: Path, tmp_path: Path) -> None:
    smalto.train(store, recipe_for(tmp_path), out=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "tokenizer-of-store", tmp_path / "other" / "tokenizer-of-store")
    other = make_store(tmp_path / "other", make_tokenizer(), range(5, 45))
    with pytest.raises(RunError, match="start a new run"):
        smalto.resume(tmp_path / "run", other, settings={"steps": 8})
    assert all(path.read_bytes() == data for path, data in before.items())


def test_damaged_baselines_are_computed_again(store: Path, tmp_path: Path) -> None:
    smalto.train(store, recipe_for(tmp_path), out=tmp_path / "run")
    path = tmp_path / "run" / "baselines.json"
    before = path.read_text()
    path.write_text("{}")
    smalto.resume(tmp_path / "run")
    assert path.read_text() == before


def test_no_image_is_encoded_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("VAR encodes every image in every epoch")

    monkeypatch.setattr(ImageTokenizer, "encode", fail)
    smalto.train(store, recipe_for(tmp_path), out=tmp_path / "run")


def test_labels_can_be_left_out(store: Path, tmp_path: Path) -> None:
    smalto.train(store, recipe_for(tmp_path, data__labels=False), out=tmp_path / "run")
    generator = smalto.load_generator(tmp_path / "run")
    assert generator.config.num_classes == 0
    assert generator.generate(num_images=2).images.shape == (2, 3, *SIZE)
    unlabelled = make_store(tmp_path / "none", make_tokenizer(), labels=())
    smalto.train(unlabelled, recipe_for(tmp_path), out=tmp_path / "run-2")
    assert smalto.load_generator(tmp_path / "run-2").config.num_classes == 0


def test_rows_without_a_label_are_trained_without(tmp_path: Path) -> None:
    path = make_store(tmp_path, make_tokenizer(), labels=("", "dog", "owl"))
    trained = smalto.train(path, recipe_for(tmp_path), out=tmp_path / "run")
    assert trained.generator.config.class_names == ("dog", "owl")
    assert trained.metrics is not None
    assert math.isfinite(trained.metrics.held_out.loss)


def test_what_does_not_fit_is_refused(store: Path, tmp_path: Path) -> None:
    def start(**changes: Any) -> None:
        smalto.train(store, recipe_for(tmp_path, **changes), out=tmp_path / "run")

    make_tokenizer(seed=1).save(tmp_path / "other")
    with pytest.raises(RunError, match="not the one that wrote"):
        start(data__tokenizer=str(tmp_path / "other"))
    with pytest.raises(RunError, match="--set data"):
        start(data__tokenizer="")
    with pytest.raises(ConfigError, match="rows to train on"):
        start(data__batch=4096)
    assert not (tmp_path / "run").exists()
    start()
    with pytest.raises(RunError, match="--overwrite"):
        start()
    with pytest.raises(ConfigError, match="a resumed run keeps its"):
        smalto.resume(tmp_path / "run", settings={"generator.depth": 3})
    other = make_store(tmp_path / "elsewhere", make_tokenizer(seed=1))
    with pytest.raises(RunError, match="not the one that wrote"):
        smalto.resume(tmp_path / "run", other)


def test_a_store_without_the_recipe_of_a_generator_is_explained(
    store: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="name its recipe"):
        smalto.train(store, out=tmp_path / "run")


def test_stores_whose_images_keep_their_shape_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("vector")
    tokenizer.save(tmp_path / "tokenizer-of-store")
    path = tmp_path / "varying.lance"
    TokenStore.create(path, tokenizer)
    with pytest.raises(InputError, match="--size"):
        smalto.train(path, recipe_for(tmp_path), out=tmp_path / "run")


def test_the_schedule_is_that_of_var() -> None:
    steps, warmup = 1000, 20
    factors = [linear_schedule(step, steps, warmup) for step in range(1, steps + 1)]
    assert factors[0] == 0.005
    assert factors[warmup] == 1.0
    assert factors[warmup + 40] == 1.0
    assert factors[-1] == pytest.approx(0.01)
    # var: utils/lr_control.py, "lin0"
    passed = (500 - warmup) / (steps - 1 - warmup)
    assert factors[500] == pytest.approx(0.01 + 0.99 * (1 - passed) / 0.95)
    recipe = GeneratorRecipe.model_validate({"data": {"batch": 512}, "steps": 1000})
    assert recipe.lr == pytest.approx(2e-4)
    assert recipe.warmup == 20


def test_a_generator_trains_from_the_command_line(store: Path, tmp_path: Path) -> None:
    sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    toml = generator_toml(tmp_path)
    tokenizer = f"data.tokenizer={tmp_path / 'tokenizer-of-store'}"
    done = smalto_command(
        "train", store, "--recipe", toml, "--out", tmp_path / "run", *sets, "--set", tokenizer
    )
    assert "below the histogram" in done.stdout
    again = smalto_command("train", "--resume", tmp_path / "run", "--steps", 8)
    assert "resuming after step 6 of 8" in again.stderr


def test_the_generator_of_a_run_is_the_task_s(store: Path, tmp_path: Path) -> None:
    trained = smalto.train(store, recipe_for(tmp_path), out=tmp_path / "run")
    loaded = smalto.load_generator(tmp_path / "run")
    assert isinstance(loaded, Generator)
    assert loaded.fingerprint() == trained.generator.fingerprint()


def trained_in(
    rank: int, world: int, meeting: str, folder: str, changes: dict[str, Any]
) -> dict[str, Tensor]:
    """Train on this rank's rows of fixed batches; return the weights and the last loss."""
    if world > 1:
        join(rank, world, meeting)
    recipe = recipe_for(Path(folder), **changes)
    tokens = TrainingTokens.open(Path(folder) / "tokens.lance", recipe)
    torch.manual_seed(0)
    tokenizer = smalto.load(Path(folder) / "tokenizer-of-store")
    config = GeneratorConfig.for_tokenizer(
        tokenizer, SIZE, **recipe.generator.model_dump(), num_classes=3
    )
    task = GeneratorTask(
        Generator(Transformer(config), tokenizer), recipe, tokens.some_held_out_rows(5)
    )
    batches = tokens.batches(recipe)
    for step in range(1, 13):
        metrics = task.train_step(next(batches), step)
    state = dict(task.result.transformer.state_dict())
    state["loss"] = torch.tensor(metrics["loss"])
    state["held out"] = torch.tensor(task.evaluate()["held_out_loss"])
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_train_what_one_does(store: Path, tmp_path: Path) -> None:
    changes = {
        "optimizer__accumulate": 2,
        "optimizer__clip": 0.1,
        "generator__label_drop": 0.5,
    }
    alone = trained_in(0, 1, "", str(tmp_path), changes)
    (tmp_path / "processes").mkdir()
    first, second = in_processes(2, trained_in, tmp_path / "processes", str(tmp_path), changes)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
