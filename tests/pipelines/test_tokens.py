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
from smalto.images.reading import read_picture
from smalto.images.tensors import centre_crop, to_tensor, to_unit_range
from smalto.pipelines.decode import picture_paths
from smalto.training.recipe import Recipe
from tests.conftest import write_pictures


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    smalto.default_tokenizer(64).save(folder)
    return folder


def test_tokens_on_disk_decode_to_what_the_model_gives(tokenizer: Path, pictures: Path, tmp_path: Path) -> None:
    Image.fromarray(numpy.full((30, 21, 3), 90, numpy.uint8)).save(pictures / "other shape.jpg")
    out = tmp_path / "tokens.lance"
    result = smalto.tokenize(pictures, tokenizer, out, batch=4, device="cpu", workers=0)
    assert (result.num_images, result.num_rows, result.skipped) == (7, 7, [])
    rows = smalto.TokenStore.open(out).rows()
    assert sorted(rows["id"]) == sorted(p.name for p in pictures.iterdir())
    assert dict(zip(rows["id"], rows["layout"], strict=True))["other shape.jpg"] == TokenLayout.single(7, 5)
    model = smalto.load(tokenizer)
    paths = smalto.decode(out, tmp_path / "decoded", device="cpu")
    for name, tokens, path in zip(rows["id"], rows["tokens"], paths, strict=True):
        image = to_unit_range(centre_crop(to_tensor(read_picture(str(pictures / name))), 4))[None]
        assert torch.equal(model.encode(image)[0], tokens)
        expected = model.decode(tokens[None], model.layout(*image.shape[2:]))[0].detach()
        assert float((to_unit_range(to_tensor(read_picture(str(path)))) - expected).abs().max()) <= 0.0041  # rounding to 8 bits


def test_the_wrong_or_a_lost_tokenizer_is_refused(pictures: Path, tokenizer: Path, tmp_path: Path) -> None:
    out, other, gone = tmp_path / "t", tmp_path / "other", tmp_path / "gone"
    smalto.load(tokenizer).save(gone)
    smalto.tokenize(pictures, gone, out, device="cpu", workers=0)
    smalto.default_tokenizer(64).save(other)
    with pytest.raises(RunError, match="is not the one that wrote"):
        smalto.decode(out, tmp_path / "decoded", other, device="cpu")
    with pytest.raises(RunError, match=r"holds other tokens \(tokenizer: [0-9a-f]{60}.* in the store, [0-9a-f]{60}.* now"):
        smalto.tokenize(pictures, other, out, device="cpu", workers=0)
    shutil.rmtree(gone)
    with pytest.raises(RunError, match=r"not there any more. Name it with --tokenizer"):
        smalto.decode(out, tmp_path / "decoded")
    assert len(smalto.decode(out, tmp_path / "decoded", tokenizer, device="cpu")) == 6
    with pytest.raises(RunError, match=r"picture00\.png and 5 others exist already"):  # perhaps the originals
        smalto.decode(out, tmp_path / "decoded", tokenizer, device="cpu")
    assert len(smalto.decode(out, tmp_path / "decoded", tokenizer, overwrite=True, device="cpu", workers=0)) == 6
    with pytest.raises(RunError, match="cannot be written"):
        smalto.tokenize(pictures, tokenizer, pictures / "picture00.png" / "below a file", device="cpu")


def test_pictures_smaller_than_a_token_are_enlarged(tokenizer: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "p", 1, 1, 1)
    Image.fromarray(numpy.zeros((1, 2000, 3), numpy.uint8)).save(tmp_path / "p" / "line.png")
    smalto.tokenize(tmp_path / "p", tokenizer, tmp_path / "t", device="cpu", workers=0)
    layouts = dict(zip(*(smalto.TokenStore.open(tmp_path / "t").rows()[key] for key in ("id", "layout")), strict=True))
    assert layouts == {"line.png": TokenLayout.single(1, 768), "picture00.png": TokenLayout.single(1, 1)}


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
    paths = picture_paths(folder, names)
    assert all(path.is_relative_to(folder) and ".." not in path.parts for path in paths)
    assert len({str(path).lower() for path in paths}) == len(names)
    assert paths[0] == folder / "a.png"
    assert paths[2] == folder / "sub" / "a.png"
    assert paths[3] == folder / "etc" / "passwd.png"
    assert paths[8] != folder / "b.png"  # that is a folder
    assert all(len(part) < 256 for path in paths for part in path.parts)


def test_reconstruct_one_picture(tokenizer: Path, pictures: Path, tmp_path: Path) -> None:
    result = smalto.reconstruct(pictures / "picture00.png", tokenizer, tmp_path / "r.png", device="cpu")
    assert read_picture(str(result.path)).shape == (40, 48, 3)
    assert (result.num_tokens, result.bytes) == (120, 90)
    with pytest.raises(DataError, match="is a folder"):
        smalto.reconstruct(pictures, tokenizer, tmp_path / "q.png")
    with pytest.raises(RunError, match="exists already"):
        smalto.reconstruct(pictures / "picture00.png", tokenizer, pictures / "picture00.png")
    (pictures / "bad.png").write_bytes(b"x")
    with pytest.raises(DataError, match="cannot be read: not an image"):
        smalto.reconstruct(pictures / "bad.png", tokenizer, tmp_path / "q.png", device="cpu")


def test_evaluate_takes_the_held_out_part_of_the_training_folder(pictures: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    trained = smalto.train(pictures, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    again = smalto.evaluate(pictures, tmp_path / "run", device="cpu", workers=0).figures
    assert (again["measured_on"], again["num_images"]) == ("held-out pictures", 1)
    assert again["psnr"] == pytest.approx(trained.metrics["psnr"], rel=1e-5)
    assert smalto.evaluate(pictures, tmp_path / "run", everything=True, device="cpu", workers=0).figures["num_images"] == 6
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert smalto.evaluate(pictures, checkpoint, device="cpu", workers=0).figures["measured_on"] == "held-out pictures"
    (held_out,) = json.loads((tmp_path / "run" / "split.json").read_text())["held_out"]
    trained_on = next(p for p in pictures.iterdir() if p.name != held_out)
    with pytest.raises(DataError, match=r"trained on all 1 pictures.*--all"):
        smalto.evaluate(trained_on, tmp_path / "run", device="cpu", workers=0)
    pictures.rename(tmp_path / "moved")
    assert smalto.evaluate(tmp_path / "moved", tmp_path / "run", device="cpu", workers=0).figures["num_images"] == 1
    other = write_pictures(tmp_path / "other", 3, 50, 30)
    figures = smalto.evaluate(other, tmp_path / "run", device="cpu", workers=0).figures
    assert (figures["num_images"], figures["measured_on"]) == (3, "pictures of another source than the training's")


def test_evaluate_agrees_with_measuring_by_hand(tokenizer: Path, pictures: Path) -> None:
    model = smalto.load(tokenizer)
    figures = smalto.evaluate(pictures, model, batch=4, device="cpu", workers=0).figures
    images = torch.stack([to_unit_range(to_tensor(read_picture(str(p)))) for p in sorted(pictures.iterdir())])
    with torch.no_grad():
        out = model(images)
    by_hand = [10 * float(torch.log10(4 / (r.clamp(-1, 1) - i).square().mean())) for r, i in zip(out.reconstruction, images, strict=True)]
    assert figures["psnr"] == pytest.approx(sum(by_hand) / 6, rel=1e-5)
    assert figures["usage"] == len(out.indices.unique()) / 64
    assert figures["bits_per_pixel"] == pytest.approx(6 / 16)


def test_info_knows_what_things_are(pictures: Path, tiny_recipe: Recipe, tokenizer: Path, tmp_path: Path) -> None:
    smalto.train(pictures, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    smalto.tokenize(pictures, tokenizer, tmp_path / "t", device="cpu", workers=0)
    assert smalto.info(tmp_path / "run")["steps"] == "6 of 6"
    assert smalto.info(tokenizer)["kind"] == "tokenizer"
    facts = smalto.info(tmp_path / "t")
    assert (facts["kind"], facts["rows"], facts["quantizer"]) == ("token store", 6, "vector")
    with pytest.raises(RunError, match="no run, tokenizer or token store"):
        smalto.info(pictures)
