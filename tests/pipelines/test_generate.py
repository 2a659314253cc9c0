"""Making images: files, tokens, manifests, edits, and what happens when it is interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import smalto
from smalto.core.errors import InputError, RunError
from smalto.generator import Generator, GeneratorConfig, Transformer
from smalto.generator.inpainting import box_mask, kept_tokens
from smalto.images.single_image import fitted, fitted_mask
from smalto.images.tensors import to_uint8
from smalto.store.token_store import TokenStore
from tests.conftest import make_image, smalto_command
from tests.training.test_generator_training import SIZE, make_tokenizer

NAMES = ("big cat", "cattle", "owl")


@pytest.fixture(scope="module")
def generator() -> Generator:
    tokenizer = make_tokenizer()
    config = GeneratorConfig.for_tokenizer(
        tokenizer, SIZE, depth=2, width=16, num_heads=2, num_classes=3, class_names=NAMES
    )
    transformer = Transformer(config)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return Generator(transformer, tokenizer).eval()


def pixels(path: Path) -> numpy.ndarray:
    with Image.open(path) as image:
        return numpy.asarray(image)


def test_images_tokens_and_manifest_are_of_one_kind(generator: Generator, tmp_path: Path) -> None:
    made = smalto.generate(generator, tmp_path / "s", count=5, seed=3, precision="float32")
    assert [path.name for path in made.paths[:3]] == [
        "000000-big-cat.png",
        "000001-cattle.png",
        "000002-owl.png",
    ]
    seeds = [3 * 2**32 + i for i in range(5)]
    samples = generator.generate([0, 1, 2, 0, 1], seeds=seeds)
    store = TokenStore.open(tmp_path / "s" / "tokens.lance")
    rows = store.rows()
    assert rows["label"] == [*NAMES, *NAMES[:2]]
    assert torch.equal(rows["tokens"], torch.cat(samples.idx_Bl, dim=1))
    assert store.header.fingerprint == generator.tokenizer.fingerprint()
    for path, image in zip(made.paths, to_uint8(samples.images), strict=True):
        own = torch.from_numpy(pixels(path).copy()).permute(2, 0, 1)
        assert (own.int() - image.int()).abs().max() <= 1
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["generator"] == generator.fingerprint()
    assert (manifest["seed"], manifest["count"], manifest["guidance"]) == (3, 5, 1.5)
    assert pixels(tmp_path / "s" / "contact-sheet.png").shape == (44, 88, 3)


def test_an_interrupted_call_goes_on(generator: Generator, tmp_path: Path) -> None:
    whole = smalto.generate(generator, tmp_path / "whole", count=7, batch=3)
    smalto.generate(generator, tmp_path / "part", count=4, batch=2)
    (tmp_path / "part" / "000001-cattle.png").unlink()
    made = smalto.generate(generator, tmp_path / "part", count=7, batch=3)
    assert made.num_new == 4
    assert len(TokenStore.open(tmp_path / "part" / "tokens.lance")) == 7
    for own, other in zip(made.paths, whole.paths, strict=True):
        assert own.read_bytes() == other.read_bytes()
    again = smalto.generate(generator, tmp_path / "part", count=7)
    assert again.num_new == 0


def test_images_of_other_settings_stay(generator: Generator, tmp_path: Path) -> None:
    smalto.generate(generator, tmp_path / "s", count=2)
    (tmp_path / "s" / "mine.png").write_bytes(b"mine")
    before = (tmp_path / "s" / "000000-big-cat.png").read_bytes()
    with pytest.raises(RunError, match="other settings"):
        smalto.generate(generator, tmp_path / "s", count=2, seed=1)
    assert (tmp_path / "s" / "000000-big-cat.png").read_bytes() == before
    made = smalto.generate(generator, tmp_path / "s", count=1, label="owl", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "s").glob("*.png")) == [
        "000000-owl.png",
        "contact-sheet.png",
        "mine.png",
    ]
    assert len(TokenStore.open(tmp_path / "s" / "tokens.lance")) == len(made.paths) == 1


def test_folders_of_others_stay(generator: Generator, tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path / "a" / "tokens.lance", generator.tokenizer)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("not JSON")
    (tmp_path / "b" / "000001.png").write_bytes(b"mine")
    for name in "ab":
        for overwrite in (False, True):
            with pytest.raises(RunError, match="did not write"):
                smalto.generate(generator, tmp_path / name, overwrite=overwrite)
    assert store.path.is_dir()
    assert (tmp_path / "b" / "000001.png").read_bytes() == b"mine"


def test_an_image_that_was_cut_short_is_made_again(generator: Generator, tmp_path: Path) -> None:
    made = smalto.generate(generator, tmp_path / "s", count=2)
    whole = made.paths[1].read_bytes()
    made.paths[1].write_bytes(whole[:50])
    assert smalto.generate(generator, tmp_path / "s", count=2).num_new == 1
    assert made.paths[1].read_bytes() == whole


def test_arrays_of_other_settings_stay(generator: Generator, tmp_path: Path) -> None:
    npz = tmp_path / "all.npz"
    smalto.generate(generator, tmp_path / "s", count=2, npz=npz)
    smalto.generate(generator, tmp_path / "s", count=3, npz=npz)
    with pytest.raises(RunError, match="holds other images"):
        smalto.generate(generator, tmp_path / "other", count=3, seed=1, npz=npz)
    with pytest.raises(RunError, match=r"ends with \.npz"):
        smalto.generate(generator, tmp_path / "s", npz=tmp_path / "all.npy")
    with numpy.load(npz) as file:
        assert len(file["arr_0"]) == 3


def test_the_array_is_what_evaluators_read(generator: Generator, tmp_path: Path) -> None:
    made = smalto.generate(generator, tmp_path / "s", count=4, npz=tmp_path / "all.npz")
    with numpy.load(tmp_path / "all.npz") as file:
        assert file.files == ["arr_0"]
        images = file["arr_0"]
    assert (images.dtype, images.shape) == (numpy.uint8, (4, *SIZE, 3))
    for image, path in zip(images, made.paths, strict=True):
        assert numpy.array_equal(image, pixels(path))
    manifest = json.loads((tmp_path / "all.npz.json").read_text())
    assert manifest["generator"] == generator.fingerprint()


@pytest.mark.parametrize(
    ("label", "number"), [("owl", 2), ("OW", 2), ("big", 0), ("cattle", 1), ("1", 1), (1, 1)]
)
def test_labels_are_found(
    generator: Generator, label: str | int, number: int, tmp_path: Path
) -> None:
    made = smalto.generate(generator, tmp_path, label=label, count=1)
    assert made.paths[0].name == f"000000-{NAMES[number].replace(' ', '-')}.png"


def test_an_edit_keeps_the_other_tokens(generator: Generator, tmp_path: Path) -> None:
    image = make_image(1, 32, 48)  # twice the generator's size
    Image.fromarray(image).save(tmp_path / "image.png")
    box = 0, 0, 16, 12
    smalto.generate(
        generator, tmp_path / "s", edit=tmp_path / "image.png", box=box, label="owl", count=3
    )
    layout = generator.config.layout
    small = fitted(image, *SIZE)
    tokens = generator.tokenizer.encode(small[None].float() / 127.5 - 1)
    mask = kept_tokens(fitted_mask(box_mask((32, 48), box), *SIZE), layout)
    assert 0 < int(mask.sum()) < layout.num_tokens
    rows = TokenStore.open(tmp_path / "s" / "tokens.lance").rows()["tokens"]
    assert torch.equal(rows[:, mask[0]], tokens[:, mask[0]].expand(3, -1))
    assert not torch.equal(rows[0], rows[1])

    drawn = numpy.zeros((32, 48), numpy.uint8)
    drawn[:12, :16] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    smalto.generate(
        generator,
        tmp_path / "by-mask",
        edit=tmp_path / "image.png",
        mask=tmp_path / "mask.png",
        label="owl",
        count=3,
    )
    other = TokenStore.open(tmp_path / "by-mask" / "tokens.lance").rows()["tokens"]
    assert torch.equal(rows, other)


def test_an_edit_without_a_label_is_made_without_one(generator: Generator, tmp_path: Path) -> None:
    Image.fromarray(make_image(1, *SIZE)).save(tmp_path / "image.png")
    made = smalto.generate(
        generator, tmp_path / "s", edit=tmp_path / "image.png", box=(0, 0, 9, 9), count=2
    )
    assert [path.name for path in made.paths] == ["000000.png", "000001.png"]
    assert TokenStore.open(tmp_path / "s" / "tokens.lance").classes() == []
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["label"] == "none"


def test_coarse_tokens_stay_unless_half_of_them_is_painted() -> None:
    layout = smalto.TokenLayout(((1, 1), (2, 2), (4, 4)))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8, :8] = True
    kept = kept_tokens(mask, layout)[0]
    assert kept.tolist()[:5] == [True, False, True, True, True]
    assert kept[5:].view(4, 4).logical_not().nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    mask[:, :8] = True
    assert not kept_tokens(mask, layout)[0, 0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"label": "zebra"}, "expected one of big cat"),
        ({"label": "cat"}, "which is in big cat, cattle"),
        ({"label": 3}, "expected one of"),
        ({"count": 0}, "at least 1"),
        ({"seed": -1}, "expected 0 to"),
        ({"top_p": 2.0}, "top_p"),
        ({"box": (0, 0, 1, 1)}, "without an image"),
        ({"edit": "image.png"}, "either a box or a mask"),
        ({"edit": "image.png", "box": (40, 0, 10, 4)}, "inside the image of 48 x 32 pixels"),
        ({"edit": "image.png", "box": (0, 0, 0, 4)}, "inside the image"),
        ({"edit": "image.png", "mask": "small.png"}, "the image has 48 x 32"),
        ({"edit": "image.png", "mask": "black.png"}, "True nowhere"),
    ],
)
def test_mistakes_are_named(
    generator: Generator,
    settings: dict[str, Any],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(make_image(1, 32, 48)).save("image.png")
    Image.fromarray(make_image(1, 16, 24)).save("small.png")
    Image.new("L", (48, 32)).save("black.png")
    with pytest.raises(InputError, match=says):
        smalto.generate(generator, "s", **settings)
    assert not Path("s").exists()


def test_a_name_that_is_none_is_explained(tmp_path: Path) -> None:
    done = smalto_command("generate", tmp_path / "nothing", check=False)
    assert done.returncode == 1
    assert "does not hold a generator" in done.stderr
    done = smalto_command("generate", tmp_path, "--box", "1,2,3", check=False)
    assert "x,y,width,height" in done.stderr


def test_half_precision_makes_nearly_the_same_images(generator: Generator) -> None:
    fast = generator.for_inference("bf16")
    assert fast.new_cache(1).num_bytes * 2 == generator.new_cache(1).num_bytes
    layout = generator.config.layout
    rows = torch.randint(0, 16, (2, layout.num_tokens), generator=torch.Generator().manual_seed(0))
    inputs = generator.tokenizer.idxBl_to_var_input(list(rows.split(layout.lengths, dim=1)))
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        own, other = generator(labels, inputs), fast(labels, inputs)
    assert other.dtype == torch.float32
    torch.testing.assert_close(own, other, rtol=0.05, atol=0.05)
    assert fast.generate([0, 1], seeds=[1, 2]).images.dtype == torch.float32
