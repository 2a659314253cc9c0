"""Tokens to disk and back, evaluation, and what info says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import smalto
from smalto.data.images import read_picture
from smalto.data.pictures import centre_crop, to_tensor, to_unit_range
from smalto.data.token_file import TokenFile
from smalto.errors import ConfigError, DataError, RunError
from smalto.layout import TokenLayout
from smalto.pipelines.tokenize import picture_paths
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
    out = tmp_path / "tokens.safetensors"
    result = smalto.tokenize(pictures, tokenizer, out, batch=4, device="cpu", workers=0)
    assert (result.num_images, result.skipped) == (7, [])
    file = TokenFile.load(out)
    assert file.names == sorted(p.name for p in pictures.iterdir())
    assert dict(zip(file.names, file.layouts, strict=True))["other shape.jpg"] == TokenLayout.single(7, 5)
    model = smalto.load(tokenizer)
    paths = smalto.decode(out, tmp_path / "decoded", device="cpu")
    for name, tokens, path in zip(file.names, file.tokens, paths, strict=True):
        image = to_unit_range(centre_crop(to_tensor(read_picture(str(pictures / name))), 4))[None]
        assert torch.equal(model.encode(image)[0], tokens)
        expected = model.decode(tokens[None], model.layout(*image.shape[2:]))[0].detach()
        assert float((to_unit_range(to_tensor(read_picture(str(path)))) - expected).abs().max()) <= 0.0041  # rounding to 8 bits


def test_a_square_size_cuts_and_enlarges(tokenizer: Path, pictures: Path, tmp_path: Path) -> None:
    smalto.tokenize(pictures, tokenizer, tmp_path / "t", size=64, device="cpu", workers=0)
    assert set(TokenFile.load(tmp_path / "t").layouts) == {TokenLayout.single(16, 16)}
    with pytest.raises(ConfigError, match="multiple of the tokenizer's stride 4; got 30"):
        smalto.tokenize(pictures, tokenizer, tmp_path / "u", size=30, device="cpu", workers=0)


def test_the_wrong_or_a_lost_tokenizer_is_refused(tokenizer: Path, pictures: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "t", tmp_path / "other"
    smalto.tokenize(pictures, tokenizer, out, device="cpu", workers=0)
    with pytest.raises(RunError, match="exists already"):
        smalto.tokenize(pictures, tokenizer, out)
    smalto.default_tokenizer(64).save(other)
    with pytest.raises(RunError, match="is not the one that wrote"):
        smalto.decode(out, tmp_path / "decoded", other, device="cpu")
    file = TokenFile.load(out)
    TokenFile(**(vars(file) | {"tokenizer": "/gone"})).save(out)
    with pytest.raises(RunError, match=r"not there any more. Name it with --tokenizer"):
        smalto.decode(out, tmp_path / "decoded")
    assert len(smalto.decode(out, tmp_path / "decoded", tokenizer, device="cpu")) == 6
    with pytest.raises(RunError, match=r"picture00\.png and 5 others exist already"):  # perhaps the originals
        smalto.decode(out, tmp_path / "decoded", tokenizer, device="cpu")
    assert len(smalto.decode(out, tmp_path / "decoded", tokenizer, overwrite=True, device="cpu", workers=0)) == 6
    with pytest.raises(RunError, match="is a folder"):
        smalto.tokenize(pictures, tokenizer, tmp_path, overwrite=True)
    with pytest.raises(RunError, match="cannot be written"):
        smalto.tokenize(pictures, tokenizer, out / "below a file")


def test_damaged_token_files_are_named(tokenizer: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    smalto.tokenize(pictures, tokenizer, out, device="cpu", workers=0)
    file = TokenFile.load(out)
    for change in ({"names": file.names[1:]}, {"codebook_size": int(torch.cat(file.tokens).max())}, {"layouts": file.layouts[1:]}):
        TokenFile(**(vars(file) | change)).save(tmp_path / "u")
        with pytest.raises(DataError, match="contradicts itself"):
            TokenFile.load(tmp_path / "u")
    out.write_bytes(out.read_bytes()[:-10])
    with pytest.raises(DataError, match="damaged"):
        TokenFile.load(out)
    smalto.load(tokenizer).save(tmp_path / "v")
    with pytest.raises(DataError, match="not a token file"):
        TokenFile.load(tmp_path / "v" / "model.safetensors")
    with pytest.raises(DataError, match="does not exist"):
        TokenFile.load(tmp_path / "nowhere")


def test_token_files_with_wrong_headers_are_named(tokenizer: Path, pictures: Path, tmp_path: Path) -> None:
    import safetensors.numpy

    tensors = {"tokens": numpy.zeros(4, numpy.uint16), "grids": numpy.array([[[2, 2]]], numpy.int32)}
    header = {
        "format_version": 2,
        "names": ["a"],
        "codebook_size": 4,
        "tokenizer": "t",
        "fingerprint": "f",
        "transform": "",
        "precision": "float32",
    }

    def load(tensors: dict[str, numpy.ndarray], header: object) -> TokenFile:
        (tmp_path / "t").write_bytes(safetensors.numpy.save(tensors, {"smalto": json.dumps(header)}))
        return TokenFile.load(tmp_path / "t")

    assert load(tensors, header).layouts == [TokenLayout.single(2, 2)]
    for wrong in ({"names": [7]}, {"codebook_size": "many"}, {"tokenizer": None}, {"format_version": 1}, {"more": 1}):
        with pytest.raises(DataError, match="damaged"):
            load(tensors, header | wrong)
    with pytest.raises(DataError, match="damaged"):
        load(tensors, {k: v for k, v in header.items() if k != "names"})
    for shape in ({"grids": numpy.array([2, 2], numpy.int32)}, {"tokens": numpy.zeros((2, 2), numpy.uint16)}, {"tokens": numpy.zeros(4)}):
        with pytest.raises(DataError, match="contradicts itself"):
            load(tensors | shape, header)


def test_pictures_smaller_than_a_token_are_enlarged(tokenizer: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "p", 1, 1, 1)
    Image.fromarray(numpy.zeros((1, 2000, 3), numpy.uint8)).save(tmp_path / "p" / "line.png")
    smalto.tokenize(tmp_path / "p", tokenizer, tmp_path / "t", device="cpu", workers=0)
    assert TokenFile.load(tmp_path / "t").layouts == [TokenLayout.single(1, 768), TokenLayout.single(1, 1)]


def test_token_files_are_small_and_deterministic(tokenizer: Path, pictures: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        smalto.tokenize(pictures, tokenizer, tmp_path / name, device="cpu", workers=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").stat().st_size < 2 * 6 * 120 + 1500


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
    assert smalto.info(tmp_path / "t")["tokens"] == 720
    with pytest.raises(RunError, match="no run, tokenizer or token file"):
        smalto.info(pictures)
