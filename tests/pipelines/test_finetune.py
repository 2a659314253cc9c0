"""Fine-tuning: what stays, what changes, and where it may begin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smalto
from smalto.core.errors import ConfigError, DataError
from smalto.pipelines.train import Trained
from smalto.training.recipe import change_recipe
from smalto.training.recipe_file import load_recipe
from smalto.training.run_folder import START_FOLDER, RunFolder
from smalto.training.tokenizer_recipe import TokenizerRecipe
from tests.conftest import smalto_command


@pytest.fixture
def start(image_folder: Path, tiny_recipe: TokenizerRecipe, tmp_path: Path) -> Path:
    smalto.train(image_folder, tiny_recipe, out=tmp_path / "start", device="cpu", workers=0)
    return tmp_path / "start"


def finetuned(
    image_folder: Path, start: object, out: Path, learn: str, **settings: object
) -> Trained:
    chosen = {
        "steps": 12,
        "data.size": 16,
        "data.batch": 4,
        "finetune.learn": learn,
        "optimizer.lr": 0.01,
        "evaluate.crops": 4,
    }
    recipe = change_recipe(TokenizerRecipe(), chosen | settings)
    return smalto.train(image_folder, recipe, out=out, start=start, device="cpu", workers=0)  # type: ignore[arg-type]


def test_with_the_decoder_alone_no_token_changes(
    image_folder: Path, start: Path, tmp_path: Path
) -> None:
    trained = finetuned(image_folder, start, tmp_path / "decoder", "decoder")
    before, after = smalto.load(start), smalto.load(tmp_path / "decoder")
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    assert torch.equal(before.encode(images), after.encode(images))
    assert trained.metrics.changed_indices.share == 0
    assert not torch.equal(before.decoder[0].weight, after.decoder[0].weight)  # type: ignore[index]
    assert "by this fine-tuning (N = 1)" in (tmp_path / "decoder" / "report.html").read_text()


def test_everything_or_all_but_the_codebook(
    image_folder: Path, start: Path, tmp_path: Path
) -> None:
    codes = smalto.load(start).quantize.embedding.weight
    for learn in ("everything", "all-but-codebook"):
        trained = finetuned(image_folder, start, tmp_path / learn, learn)
        assert trained.metrics.changed_indices.share > 0
        assert torch.equal(codes, smalto.load(tmp_path / learn).quantize.embedding.weight) == (
            learn == "all-but-codebook"
        )
        recipe = load_recipe(RunFolder(tmp_path / learn).path / "recipe.toml")
        assert recipe.finetune.tokenizer == str(start)
        assert (
            recipe.tokenizer.quantizer.codebook_size == 16
        )  # the tokenizer's own, not the default recipe's
        assert (
            smalto.load(tmp_path / learn / START_FOLDER).fingerprint()
            == smalto.load(start).fingerprint()
        )


def test_it_begins_where_the_other_run_ended(
    image_folder: Path, start: Path, tmp_path: Path
) -> None:
    trained = finetuned(image_folder, start, tmp_path / "none", "everything", steps=0)
    assert trained.tokenizer.fingerprint() == smalto.load(start).fingerprint()
    assert trained.metrics.changed_indices.share == 0


def test_a_fine_tuning_resumes_as_what_it_is(
    image_folder: Path, start: Path, tmp_path: Path
) -> None:
    whole = finetuned(image_folder, start, tmp_path / "whole", "decoder")
    finetuned(
        image_folder, start, tmp_path / "part", "decoder", steps=5, **{"optimizer.decay": False}
    )
    finetuned(image_folder, start, tmp_path / "same", "decoder", **{"optimizer.decay": False})
    resumed = smalto.resume(tmp_path / "part", settings={"steps": 12}, device="cpu", workers=0)
    assert resumed.metrics.changed_indices.share == 0
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (
        tmp_path / "same" / "model.safetensors"
    ).read_bytes()
    assert whole.training.steps == 12
    with pytest.raises(ConfigError, match=r"keeps its finetune\.learn"):
        smalto.resume(tmp_path / "part", settings={"finetune.learn": "everything"})


def test_a_simple_vqvae_and_a_file_of_var_are_starts_too(
    image_folder: Path, tmp_path: Path
) -> None:
    trained = finetuned(
        image_folder, smalto.SimpleVQVAE(16, 8, 8), tmp_path / "simple", "everything"
    )
    assert load_recipe(trained.run.path / "recipe.toml").finetune.tokenizer == "a tokenizer"
    settings = {
        "tokenizer.autoencoder.kind": "cnn",
        "tokenizer.autoencoder.ch": 32,
        "tokenizer.autoencoder.ch_mult": [1, 1, 1],
        "tokenizer.autoencoder.num_res_blocks": 1,
        "tokenizer.autoencoder.latent_dim": 8,
        "tokenizer.quantizer.kind": "multiscale",
        "tokenizer.quantizer.scales": [
            1,
            2,
            3,
            4,
            5,
            6,
            8,
            10,
            13,
            16,
        ],  # VAR's own: the file does not say them
        "tokenizer.quantizer.scale.codebook_size": 16,
        "tokenizer.quantizer.scale.latent_dim": 8,
        "data.size": 64,
    }
    var = change_recipe(TokenizerRecipe(), settings).tokenizer.build()
    var.save(tmp_path / "var")
    smalto.convert(tmp_path / "var", tmp_path / "var.pth", "var")
    small = {"data.size": 64, "data.batch": 2, "steps": 2}
    trained = finetuned(
        image_folder, tmp_path / "var.pth", tmp_path / "from-var", "decoder", **small
    )
    assert trained.metrics.changed_indices.share == 0
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(DataError, match="is damaged or not a checkpoint of torch"):
        finetuned(image_folder, tmp_path / "other.pth", tmp_path / "other", "everything")


def test_mistakes(image_folder: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer was named to start from"):
        smalto.train(
            image_folder,
            change_recipe(TokenizerRecipe(), {"finetune.learn": "decoder"}),
            out=tmp_path / "a",
            workers=0,
        )
    with pytest.raises(ConfigError, match="multiple of the tokenizer's stride 4"):
        finetuned(
            image_folder,
            start,
            tmp_path / "b",
            "everything",
            **{"data.size": 18, "tokenizer.autoencoder.encoder_relu": True},
        )


def test_on_the_command_line(image_folder: Path, start: Path, tmp_path: Path) -> None:
    arguments = [
        "--out",
        tmp_path / "cli",
        "--steps",
        3,
        "--size",
        16,
        "--batch",
        4,
        "--workers",
        0,
    ]
    done = smalto_command("train", image_folder, "--from", start, "--learn", "decoder", *arguments)
    assert "indices changed" in done.stdout
    done = smalto_command("train", "--resume", tmp_path / "cli", "--learn", "decoder", check=False)
    assert "leave out --recipe, --overwrite, --from and --learn" in done.stderr
