"""Tokens to disk and back, evaluation, and what info says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import smalto
from smalto.core.errors import DataError, RunError
from smalto.core.layout import TokenLayout
from smalto.images.reading import read_image
from smalto.images.tensors import center_crop, to_tensor, to_unit_range
from smalto.pipelines.decode import image_paths
from smalto.training.tokenizer_recipe import TokenizerRecipe
from tests.conftest import write_images


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    smalto.default_tokenizer(64).save(folder)
    return folder


def test_tokens_on_disk_decode_to_what_the_model_gives(
    tokenizer: Path, image_folder: Path, tmp_path: Path
) -> None:
    Image.fromarray(numpy.full((30, 21, 3), 90, numpy.uint8)).save(image_folder / "other shape.jpg")
    out = tmp_path / "tokens.lance"
    result = smalto.tokenize(image_folder, tokenizer, out, batch=4, device="cpu", workers=0)
    assert (result.num_images, result.num_rows, result.skipped) == (7, 7, [])
    rows = smalto.TokenStore.open(out).rows()
    assert sorted(rows["id"]) == sorted(p.name for p in image_folder.iterdir())
    assert dict(zip(rows["id"], rows["layout"], strict=True))[
        "other shape.jpg"
    ] == TokenLayout.single(7, 5)
    model = smalto.load(tokenizer)
    paths = smalto.decode(out, tmp_path / "decoded", device="cpu")
    for name, tokens, path in zip(rows["id"], rows["tokens"], paths, strict=True):
        image = to_unit_range(center_crop(to_tensor(read_image(str(image_folder / name))), 4))[None]
        assert torch.equal(model.encode(image)[0], tokens)
        expected = model.decode(tokens[None], model.layout(*image.shape[2:]))[0].detach()
        assert (
            float((to_unit_range(to_tensor(read_image(str(path)))) - expected).abs().max())
            <= 0.0041
        )  # rounding to 8 bits


def test_the_wrong_or_a_lost_tokenizer_is_refused(
    image_folder: Path, tokenizer: Path, tmp_path: Path
) -> None:
    out, other, gone = tmp_path / "t", tmp_path / "other", tmp_path / "gone"
    smalto.load(tokenizer).save(gone)
    smalto.tokenize(image_folder, gone, out, device="cpu", workers=0)
    smalto.default_tokenizer(64).save(other)
    with pytest.raises(RunError, match="is not the one that wrote"):
        smalto.decode(out, tmp_path / "decoded", other, device="cpu")
    with pytest.raises(
        RunError,
        match=r"holds other tokens \(tokenizer: [0-9a-f]{60}.* in the store, [0-9a-f]{60}.* now",
    ):
        smalto.tokenize(image_folder, other, out, device="cpu", workers=0)
    shutil.rmtree(gone)
    with pytest.raises(
        RunError, match=r"no longer exists\. Name the folder of the tokenizer with --tokenizer"
    ):
        smalto.decode(out, tmp_path / "decoded")
    assert len(smalto.decode(out, tmp_path / "decoded", tokenizer, device="cpu")) == 6
    with pytest.raises(
        RunError, match=r"photo00\.png and 5 others exist already"
    ):  # perhaps the originals
        smalto.decode(out, tmp_path / "decoded", tokenizer, device="cpu")
    assert (
        len(
            smalto.decode(
                out, tmp_path / "decoded", tokenizer, overwrite=True, device="cpu", workers=0
            )
        )
        == 6
    )
    with pytest.raises(RunError, match="cannot be written"):
        smalto.tokenize(
            image_folder, tokenizer, image_folder / "photo00.png" / "below a file", device="cpu"
        )


def test_images_smaller_than_a_token_are_enlarged(tokenizer: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "p", 1, 1, 1)
    Image.fromarray(numpy.zeros((1, 2000, 3), numpy.uint8)).save(tmp_path / "p" / "line.png")
    smalto.tokenize(tmp_path / "p", tokenizer, tmp_path / "t", device="cpu", workers=0)
    layouts = dict(
        zip(
            *(smalto.TokenStore.open(tmp_path / "t").rows()[key] for key in ("id", "layout")),
            strict=True,
        )
    )
    assert layouts == {
        "line.png": TokenLayout.single(1, 768),
        "photo00.png": TokenLayout.single(1, 1),
    }


def test_decoded_names_stay_inside_and_apart() -> None:
    folder = Path("out")
    names = [
        "a.jpg",
        "A.png",
        "sub/a.jpg",
        "../../etc/passwd",
        "/abs.png",
        "..",
        "a.png.png",
        "a.jpg.png",
        "b.jpg",
        "b.png/c.jpg",
        "x" * 255,
    ]
    paths = image_paths(folder, names)
    assert all(path.is_relative_to(folder) and ".." not in path.parts for path in paths)
    assert len({str(path).lower() for path in paths}) == len(names)
    assert paths[0] == folder / "a.png"
    assert paths[2] == folder / "sub" / "a.png"
    assert paths[3] == folder / "etc" / "passwd.png"
    assert paths[8] != folder / "b.png"  # that is a folder
    assert all(len(part) < 256 for path in paths for part in path.parts)


def test_reconstruct_one_image(tokenizer: Path, image_folder: Path, tmp_path: Path) -> None:
    result = smalto.reconstruct(
        image_folder / "photo00.png", tokenizer, tmp_path / "r.png", device="cpu"
    )
    assert read_image(str(result.path)).shape == (40, 48, 3)
    assert (result.num_tokens, result.bytes) == (120, 90)
    with pytest.raises(DataError, match="expected one image"):
        smalto.reconstruct(image_folder, tokenizer, tmp_path / "q.png")
    with pytest.raises(RunError, match="exists already"):
        smalto.reconstruct(image_folder / "photo00.png", tokenizer, image_folder / "photo00.png")
    (image_folder / "bad.png").write_bytes(b"x")
    with pytest.raises(DataError, match="cannot be read: not an image"):
        smalto.reconstruct(image_folder / "bad.png", tokenizer, tmp_path / "q.png", device="cpu")


def test_evaluate_takes_the_held_out_part_of_the_training_folder(
    image_folder: Path, tiny_recipe: TokenizerRecipe, tmp_path: Path
) -> None:
    trained = smalto.train(image_folder, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    again = smalto.evaluate(image_folder, tmp_path / "run", device="cpu", workers=0).metrics
    assert (again.measured_on, again.num_images) == ("held-out images", 1)
    assert again.psnr == pytest.approx(trained.metrics.psnr, rel=1e-5)
    assert (
        smalto.evaluate(
            image_folder, tmp_path / "run", everything=True, device="cpu", workers=0
        ).metrics.num_images
        == 6
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert (
        smalto.evaluate(image_folder, checkpoint, device="cpu", workers=0).metrics.measured_on
        == "held-out images"
    )
    (held_out,) = json.loads((tmp_path / "run" / "split.json").read_text())["held_out"]
    trained_on = next(p for p in image_folder.iterdir() if p.name != held_out)
    with pytest.raises(DataError, match=r"trained on all 1 images.*--all"):
        smalto.evaluate(trained_on, tmp_path / "run", device="cpu", workers=0)
    image_folder.rename(tmp_path / "moved")
    assert (
        smalto.evaluate(
            tmp_path / "moved", tmp_path / "run", device="cpu", workers=0
        ).metrics.num_images
        == 1
    )
    other = write_images(tmp_path / "other", 3, 50, 30)
    metrics = smalto.evaluate(other, tmp_path / "run", device="cpu", workers=0).metrics
    assert (metrics.num_images, metrics.measured_on) == (
        3,
        "images of another source than the training's",
    )


def test_evaluate_agrees_with_measuring_by_hand(tokenizer: Path, image_folder: Path) -> None:
    model = smalto.load(tokenizer)
    metrics = smalto.evaluate(image_folder, model, batch=4, device="cpu", workers=0).metrics
    images = torch.stack(
        [to_unit_range(to_tensor(read_image(str(p)))) for p in sorted(image_folder.iterdir())]
    )
    with torch.no_grad():
        out = model(images)
    by_hand = [
        10 * float(torch.log10(4 / (r.clamp(-1, 1) - i).square().mean()))
        for r, i in zip(out.reconstruction, images, strict=True)
    ]
    assert metrics.psnr == pytest.approx(sum(by_hand) / 6, rel=1e-5)
    assert metrics.usage == len(out.indices.unique()) / 64
    assert metrics.bits_per_pixel == pytest.approx(6 / 16)


def test_info_knows_what_things_are(
    image_folder: Path, tiny_recipe: TokenizerRecipe, tokenizer: Path, tmp_path: Path
) -> None:
    smalto.train(image_folder, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    smalto.tokenize(image_folder, tokenizer, tmp_path / "t", device="cpu", workers=0)
    assert smalto.info(tmp_path / "run")["steps"] == "6 of 6"
    assert smalto.info(tokenizer)["kind"] == "tokenizer"
    metadata = smalto.info(tmp_path / "t")
    assert (metadata["kind"], metadata["rows"], metadata["quantizer"]) == (
        "token store",
        6,
        "vector",
    )
    with pytest.raises(RunError, match="not a run, tokenizer, generator or token store"):
        smalto.info(image_folder)
