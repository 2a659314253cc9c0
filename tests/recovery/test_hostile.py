"""What users and files can do wrong ends in one line: got, expected, what to do."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import smalto
from smalto.core.errors import ConfigError, DataError, RunError, SmaltoError
from smalto.core.weight_files import read_weights
from smalto.pipelines.info import store_metadata
from smalto.store.check import check_store
from smalto.store.exports import export_store, import_store
from smalto.store.token_store import TokenStore
from smalto.training.recipe import parse_setting
from smalto.training.recipe_file import load_recipe
from smalto.training.run_folder import RunFolder, read_log
from smalto.training.tokenizer_recipe import TokenizerRecipe
from tests.conftest import smalto_command, store_header, token_rows, write_images

DEEP = "[" * 100_000


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    smalto.SimpleVQVAE(16, 8, 8).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = {name: change(tensor) for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(state, path, metadata)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tokenizer: Path) -> None:
    change_weights(tokenizer, lambda tensor: torch.full_like(tensor, value))
    with pytest.raises(RunError, match="holds NaN or infinite values; expected finite weights"):
        smalto.load(tokenizer)
    model = smalto.SimpleVQVAE(16, 8, 8)
    with torch.no_grad():
        next(model.parameters()).fill_(value)
    with pytest.raises(RunError, match="was not saved"):
        model.save(tokenizer.with_name("new"))
    assert not tokenizer.with_name("new").exists()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_types_are_refused(dtype: torch.dtype, tokenizer: Path) -> None:
    change_weights(tokenizer, lambda tensor: tensor.to(dtype))
    with pytest.raises(RunError, match="expected float32, float64, float16 or bfloat16"):
        smalto.load(tokenizer)


def test_images_without_finite_latents_count_as_bad(tokenizer: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 4)
    change_weights(tokenizer, lambda tensor: tensor * 1e14)
    with pytest.raises(DataError, match="4 not encodable"):
        smalto.tokenize(tmp_path / "photos", tokenizer, tmp_path / "t", workers=0)


def test_deep_json_and_toml_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f"steps = {DEEP}")
    with pytest.raises(ConfigError, match=r"r\.toml is nested too deeply"):
        load_recipe(tmp_path / "r.toml")
    store = TokenStore.create(tmp_path / "t", store_header())
    export_store(store, "numpy", tmp_path / "e")
    (tokenizer / "config.json").write_text(DEEP)
    with pytest.raises(ConfigError, match="nested too deeply"):
        smalto.load(tokenizer)
    (tmp_path / "e" / "_header.json").write_text(DEEP)
    with pytest.raises(DataError, match="nested too deeply"):
        smalto.import_store(tmp_path / "e", tmp_path / "i")
    (tmp_path / "t" / "head.json").write_text(DEEP)
    with pytest.raises(DataError, match=r"head\.json is missing or damaged"):
        TokenStore.open(tmp_path / "t")


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    write_images(tmp_path / "photos", 2)
    with pytest.raises(ConfigError, match="not a regular file"):
        load_recipe(tmp_path / "pipe")
    smalto.SimpleVQVAE(16, 8, 8).save(tmp_path / "t")
    with pytest.raises(DataError, match="not a regular file"):
        smalto.evaluate(tmp_path / "photos", tmp_path / "t", reference_stats=tmp_path / "pipe")
    (tmp_path / "t" / "config.json").unlink()
    os.mkfifo(tmp_path / "t" / "config.json")
    with pytest.raises(RunError, match="does not hold a tokenizer"):
        smalto.load(tmp_path / "t")


def test_an_emptied_recipe_is_refused(tmp_path: Path, tiny_recipe: TokenizerRecipe) -> None:
    write_images(tmp_path / "photos", 6)
    smalto.train(tmp_path / "photos", tiny_recipe, out=tmp_path / "r", device="cpu", workers=0)
    (tmp_path / "r" / "recipe.toml").write_text("")
    with pytest.raises(ConfigError, match=r"recipe\.toml is empty"):
        smalto.resume(tmp_path / "r", device="cpu", workers=0)
    (tmp_path / "r" / "recipe.toml").write_text("steps = 8\n")
    with pytest.raises(ConfigError, match=r"empty data\.source"):
        smalto.resume(tmp_path / "r", device="cpu", workers=0)


@pytest.mark.parametrize(
    "arguments",
    [
        ("tokenize", "", "--tokenizer", "t", "--out", "o"),
        ("train", ""),
        ("decode", "t.lance", "--out", ""),
        ("train", "photos", "--out="),
    ],
)
def test_empty_arguments_are_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = smalto_command(*arguments, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "got an empty value" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_empty_paths_are_refused_in_python(tokenizer: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 2)
    for call in (
        lambda: smalto.tokenize("", tokenizer, tmp_path / "t"),
        lambda: smalto.tokenize(tmp_path / "photos", tokenizer, ""),
        lambda: smalto.train("", out=tmp_path / "r"),
        lambda: smalto.train(tmp_path / "photos", out=""),
        lambda: smalto.decode(tmp_path / "t", ""),
    ):
        with pytest.raises(SmaltoError, match="empty"):
            call()


def test_links_inside_a_store_are_refused(tmp_path: Path) -> None:
    mine = TokenStore.create(tmp_path / "mine", store_header())
    mine.append(token_rows(4))
    for part in ("_versions", "data", "_errors"):
        sent = tmp_path / f"sent{part}"
        shutil.copytree(tmp_path / "mine", sent)
        shutil.rmtree(sent / part)
        (sent / part).symlink_to(tmp_path / "mine" / part)
        with pytest.raises(DataError, match="is a symbolic link"):
            TokenStore.open(sent)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert len(TokenStore.open(tmp_path / "link")) == 4  # a link to a whole store is fine


@pytest.mark.parametrize("name", ["run:3.lance", "s3:x.lance", "memory:x", "file:/u.lance", "a%b?"])
def test_a_path_is_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TokenStore.create(name, store_header()).append(token_rows(3))
    assert len(TokenStore.open(name)) == 3
    assert (tmp_path / name / "head.json").is_file()


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "x\udcff"])
def test_names_that_lance_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Name another path"):
        TokenStore.create(tmp_path / name, store_header())
    assert list(tmp_path.iterdir()) == []


def test_overwrite_spares_files_that_are_not_of_the_store(tokenizer: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 2)
    smalto.tokenize(tmp_path / "photos", tokenizer, tmp_path / "t", workers=0)
    (tmp_path / "t" / "readme.md").write_text("mine")
    with pytest.raises(RunError, match=r"not of the token store \(readme\.md\)"):
        smalto.tokenize(tmp_path / "photos", tokenizer, tmp_path / "t", workers=0, overwrite=True)
    (tmp_path / "t" / "readme.md").unlink()
    smalto.tokenize(tmp_path / "photos", tokenizer, tmp_path / "t", workers=0, overwrite=True)


def test_overwrite_spares_what_a_user_put_into_a_run(
    tmp_path: Path, tiny_recipe: TokenizerRecipe
) -> None:
    images = write_images(tmp_path / "images", 4)
    train = lambda: smalto.train(  # noqa: E731
        images, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0, overwrite=True
    )
    train()
    for name in ("checkpoints/best", "tokens.lance"):
        path = tmp_path / "run" / name
        path.mkdir()
        with pytest.raises(RunError, match=rf"not of the run \({path.name}\)"):
            train()
        path.rmdir()
    train()


def test_a_damaged_store_can_be_replaced(tokenizer: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)
    smalto.tokenize(images, tokenizer, tmp_path / "t", workers=0)
    for name in ("head.json", "_versions"):
        path = tmp_path / "t" / name
        shutil.rmtree(path) if path.is_dir() else path.write_text("{")
        smalto.tokenize(images, tokenizer, tmp_path / "t", workers=0, overwrite=True)
        assert len(TokenStore.open(tmp_path / "t")) == 4
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="is not a token store"):
        smalto.tokenize(images, tokenizer, tmp_path / "mine", workers=0, overwrite=True)


def test_stray_files_are_left_alone(tmp_path: Path, tiny_recipe: TokenizerRecipe) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    store.append(token_rows(4))
    stray = tmp_path / "t" / "_versions" / "mine.manifest"
    stray.write_text("mine")
    (tmp_path / "t" / "notes.md").touch()
    store.append(token_rows(4, first=4))
    store.compact()
    assert stray.read_text() == "mine"
    assert store_metadata(store)["other files"] == "notes.md, _versions/mine.manifest"
    write_images(tmp_path / "photos", 6)
    smalto.train(tmp_path / "photos", tiny_recipe, out=tmp_path / "r", device="cpu", workers=0)
    for name in ("step-²", "step-9", "step-mine", "notes"):
        (tmp_path / "r" / "checkpoints" / name).mkdir()
    with open(tmp_path / "r" / "log.jsonl", "a") as log:
        log.write('{"step": "mine"}\n[1]\nnot JSON\n{"step": 7, "lo')
    smalto.resume(tmp_path / "r", settings={"steps": 8}, device="cpu", workers=0)
    assert [row["step"] for row in read_log(tmp_path / "r" / "log.jsonl")] == list(range(1, 9))
    assert "not JSON\n" in (tmp_path / "r" / "log.jsonl").read_text()
    assert (tmp_path / "r" / "checkpoints" / "step-9").is_dir()
    assert RunFolder(tmp_path / "r").steps() == [6, 8]
    assert RunFolder(tmp_path / "r").other_files() == ["notes", "step-9", "step-mine", "step-²"]


def test_control_characters_never_reach_the_terminal(tmp_path: Path) -> None:
    escape = "\x1b]0;title\x07\x1b[2J"
    header = store_header().model_copy(update={"tokenizer": escape, "source": "\x1b[31m"})
    TokenStore.create(tmp_path / "t", header).append(token_rows(2))
    for arguments in (("store", "info", "t"), ("store", "verify", "t"), ("decode", "t")):
        done = smalto_command(*arguments, check=False, cwd=tmp_path)
        assert "\x1b" not in done.stdout + done.stderr
        assert "\\x1b[2J" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer.lr": 1e300},
        {"optimizer.lr": float("inf")},
        {"optimizer.weight_decay": float("inf")},
        {"optimizer.betas": [1, 1]},
        {"losses.l2.weight": float("inf")},
    ],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_recipe(None, settings)


def test_a_run_that_learned_nothing_says_so(tmp_path: Path, tiny_recipe: TokenizerRecipe) -> None:
    dataset: Any = [torch.full((3, 32, 32), torch.nan) for _ in range(6)]
    with pytest.raises(SmaltoError, match="finite"):
        smalto.train(dataset, tiny_recipe, out=tmp_path / "r", device="cpu", workers=0)


@pytest.mark.parametrize("out", ["t", "r"])
def test_an_output_that_is_removed_during_the_job(
    out: str, tokenizer: Path, tmp_path: Path, tiny_recipe: TokenizerRecipe
) -> None:
    write_images(tmp_path / "photos", 12)

    class Remove(smalto.core.progress.Progress):
        def advance(self, number: int = 1, **metrics: float) -> None:
            shutil.rmtree(tmp_path / out, ignore_errors=True)

    with pytest.raises(RunError, match="was removed"):
        if out == "t":
            smalto.tokenize(
                tmp_path / "photos", tokenizer, tmp_path / out, workers=0, progress=Remove()
            )
        else:
            smalto.train(
                tmp_path / "photos",
                tiny_recipe,
                out=tmp_path / out,
                device="cpu",
                workers=0,
                progress=Remove(),
            )
    assert not (tmp_path / out).exists()


def test_what_is_loaded_in_inference_mode_can_be_trained(tokenizer: Path) -> None:
    with torch.inference_mode():
        model = smalto.load(tokenizer)
    model.train()
    reconstruction, loss, _ = model(torch.zeros(1, 3, 16, 16))
    (reconstruction.sum() + loss).backward()


def test_odd_ids_are_decoded(tokenizer: Path, tmp_path: Path) -> None:
    model = smalto.load(tokenizer)
    store = TokenStore.create(tmp_path / "t", model, layout=model.layout(16, 16))
    ids = ["?flip", ".?flip", "..?flip", "a/..?b", "/?x", "?"]
    store.append([smalto.TokenRow(id, [0] * 16) for id in ids])
    paths = smalto.decode(tmp_path / "t", tmp_path / "d", tokenizer)
    assert len({*paths}) == len(ids)
    assert all(path.is_relative_to(tmp_path / "d") for path in paths)


def test_numbers_out_of_range_in_the_command_line(tmp_path: Path) -> None:
    TokenStore.create(tmp_path / "t", store_header())
    for arguments in (
        ("store", "verify", "t", "--seed", "-1"),
        ("tokenize", "x", "--tokenizer", "t", "--out", "o", "--workers", "99999999999"),
    ):
        done = smalto_command(*arguments, check=False, cwd=tmp_path)
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("format", ["numpy", "var", "parquet", "webdataset"])
def test_a_tampered_export_is_named(format: str, tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    store.append(token_rows(6))
    export_store(store, format, tmp_path / "e")
    header = tmp_path / "e" / "_header.json"
    fields = json.loads(header.read_text())
    for change in (
        {"classes": []},
        {"classes": [1, None]},
        {"store": fields["store"] | {"grids": None}},
        {"store": fields["store"] | {"grids": [[10**9, 10**9]]}},
        {"store": fields["store"] | {"codebook_size": 1}},
        {"num_rows": -1},
    ):
        header.write_text(json.dumps(fields | change))
        try:
            smalto.import_store(tmp_path / "e", tmp_path / "i")
        except SmaltoError:
            assert not (tmp_path / "i").exists()
        else:  # some formats hold labels and layouts in their rows too
            assert check_store(TokenStore.open(tmp_path / "i")).ok
            shutil.rmtree(tmp_path / "i")


@pytest.mark.parametrize("format", ["numpy", "var", "parquet", "webdataset"])
def test_a_pipe_in_an_export_is_named(format: str, tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    store.append(token_rows(3))
    export_store(store, format, tmp_path / "e")
    file = next(path for path in sorted((tmp_path / "e").rglob("*")) if path.suffix != ".json")
    file = next(file.iterdir()) if file.is_dir() else file
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="is a pipe or a device"):
        import_store(tmp_path / "e", tmp_path / "back")


@pytest.mark.parametrize("part", ["encoder", "quantize", "decoder"])
def test_weights_that_overflow_are_refused(part: str, tokenizer: Path) -> None:
    model = smalto.load(tokenizer)
    with torch.no_grad():
        next(getattr(model, part).parameters()).fill_(1e38)
    with pytest.raises(RunError, match=r"holds values of 1e\+15 or more"):
        model.save(tokenizer)
    change_weights(tokenizer, lambda tensor: torch.full_like(tensor, 1e38))
    with pytest.raises(RunError, match=r"holds values of 1e\+15 or more"):
        smalto.load(tokenizer)


def test_weights_in_two_types_are_refused(tokenizer: Path) -> None:
    change_weights(tokenizer, lambda tensor: tensor.half() if tensor.ndim == 1 else tensor)
    with pytest.raises(RunError, match="expected one type in all of the encoder"):
        smalto.load(tokenizer)


def test_a_compressed_weight_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
        bomb.writestr("more", bytes(2**26))
    with pytest.raises(DataError, match="is compressed and unpacks to"):
        read_weights(tmp_path / "bomb.pth")


@pytest.mark.parametrize("text", ["seed = " + "9" * 5000, ".".join(["a"] * 2000) + " = 1"])
def test_huge_numbers_and_depths_in_a_recipe(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ConfigError):
        load_recipe(tmp_path / "recipe.toml")
    with pytest.raises(ConfigError):
        load_recipe(None, dict([parse_setting("optimizer.lr=" + "[" * 3000)]))


def test_strays_in_the_folders_of_a_store_survive(tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    for first in (0, 3, 6):
        store.append(token_rows(3, first=first))
    strays = [tmp_path / "t" / "data" / "my-copy.lance", tmp_path / "t" / "_indices" / "mine"]
    strays[0].write_bytes(b"mine")
    strays[1].mkdir(parents=True)
    store.compact(timedelta(0))
    assert all(path.exists() for path in strays)
    assert store.other_files() == ["_indices/mine", "data/my-copy.lance"]
    with pytest.raises(RunError, match="not of the token store"):
        TokenStore.remove(tmp_path / "t")


def test_a_users_folder_among_the_checkpoints_is_left_alone(
    tmp_path: Path, tiny_recipe: TokenizerRecipe
) -> None:
    images = write_images(tmp_path / "images", 4)
    smalto.train(images, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    mine = tmp_path / "run" / "checkpoints" / "step-99999999"
    mine.mkdir()
    (mine / "notes.txt").touch()
    smalto.resume(tmp_path / "run", settings={"steps": 7}, device="cpu", workers=0)
    assert (mine / "notes.txt").exists()
