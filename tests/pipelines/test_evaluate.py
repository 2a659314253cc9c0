"""What evaluation measures, and what it says of every metric."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

import smalto
from smalto.autoencoders import CNNAutoencoderConfig
from smalto.core.errors import ConfigError
from smalto.evaluation.evaluator import compare
from smalto.evaluation.feature_networks import FeatureNetworks
from smalto.interop import taming
from smalto.metrics.formatting import codec_rows, metric_rows
from smalto.metrics.frechet import FeatureMoments, write_statistics
from smalto.quantizers import VectorQuantizerConfig
from smalto.tokenizer import ImageTokenizer, TokenizerConfig
from smalto.training.tokenizer_recipe import TokenizerRecipe
from tests.conftest import smalto_command, write_images
from tests.features.test_networks import inception_state, lpips_state


@pytest.fixture
def run(tmp_path: Path, tiny_recipe: TokenizerRecipe) -> Path:
    smalto.train(
        write_images(tmp_path / "images", 4, 176, 180),
        tiny_recipe,
        out=tmp_path / "run",
        device="cpu",
        workers=0,
    )
    return tmp_path / "run"


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Path]:
    torch.save(lpips_state(), tmp_path / "lpips.pth")
    torch.save(inception_state()[0], tmp_path / "inception.pth")
    return {"lpips_vgg": tmp_path / "lpips.pth", "inception_weights": tmp_path / "inception.pth"}


def test_every_metric_says_over_how_many_images(run: Path, weights: dict[str, Path]) -> None:
    images = run.parent / "images"
    measured = smalto.evaluate(
        images, run, everything=True, device="cpu", workers=0, **weights
    ).metrics
    metrics = measured.as_json()
    for name in ("psnr", "ssim", "ms_ssim", "lite0_distance", "lpips", "lite0_fid", "rfid"):
        assert numpy.isfinite(metrics[name])
        assert metrics[f"{name}_num_images"] == 4
    assert set(metrics["networks"]) == {"lite0", "lpips-vgg", "inception"}
    assert all(len(digest) == 64 for digest in metrics["networks"].values())
    assert (
        metrics["rfid_reference"]
        == metrics["lite0_fid_reference"]
        == "the images that were encoded"
    )
    rows = dict(metric_rows(measured))
    for label in ("PSNR", "SSIM", "MS-SSIM", "lite0 distance", "LPIPS (VGG)", "lite0-FID", "rFID"):
        assert "N = 4" in rows[label]
    for label in ("lite0-FID", "rFID"):
        assert "fewer than 2,048: not comparable" in rows[label]
    json.dumps(metrics, allow_nan=False)


def test_other_codecs_at_as_many_bytes_stand_beside_it(run: Path) -> None:
    measured = smalto.evaluate(
        run.parent / "images", run, everything=True, device="cpu", workers=0
    ).metrics
    metrics = measured.as_json()
    assert [line["codec"] for line in metrics["codecs"]] == ["JPEG", "WEBP"]
    for line in metrics["codecs"]:
        assert line["psnr_num_images"] == 4
        assert line["lite0_distance_num_images"] == 4
    heading, own, *others = codec_rows(measured)
    assert heading[3:] == ("PSNR", "SSIM", "lite0 distance")
    assert own[0] == "these tokens"
    assert own[3] == f"{metrics['psnr']:.2f} dB"
    assert len(others) == 2


def test_fid_can_be_measured_from_published_statistics(
    run: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    for dim in (2048, 16):
        moments = FeatureMoments(dim)
        moments.add(torch.randn(20, dim, generator=generator))
        write_statistics(tmp_path / f"{dim}.npz", moments.gaussian())
    images = run.parent / "images"
    metrics = smalto.evaluate(
        images,
        run,
        everything=True,
        device="cpu",
        workers=0,
        reference_stats=tmp_path / "2048.npz",
        inception_weights=weights["inception_weights"],
    ).metrics.as_json()
    assert metrics["rfid_reference"].startswith("2048.npz (sha256 ")
    assert metrics["lite0_fid_reference"] == "the images that were encoded"
    with pytest.raises(
        ConfigError, match=r"statistics of 16 features.*lite0 with 1280.*--inception-weights"
    ):
        smalto.evaluate(images, run, workers=0, device="cpu", reference_stats=tmp_path / "16.npz")


def test_small_and_grey_images_are_measured_by_what_fits_them() -> None:
    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    networks = FeatureNetworks.open(torch.device("cpu"))
    assert set(compare(noise(2, 3, 8, 8), noise(2, 3, 8, 8), networks)) == {"psnr"}
    assert set(compare(noise(2, 3, 16, 16), noise(2, 3, 16, 16), networks)) == {"psnr", "ssim"}
    assert set(compare(noise(2, 3, 40, 40), noise(2, 3, 40, 40), networks)) == {
        "psnr",
        "ssim",
        "lite0_distance",
    }
    assert set(compare(noise(2, 1, 176, 176), noise(2, 1, 176, 176), networks)) == {
        "psnr",
        "ssim",
        "ms_ssim",
    }


def test_ms_ssim_falls_with_noise() -> None:
    from smalto.metrics import ms_ssim

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 192, 200, generator=generator) * 2 - 1
    assert float(ms_ssim(images, images)) == pytest.approx(1, abs=1e-5)
    near, far = (
        float(ms_ssim((images + amount * torch.randn(images.shape, generator=generator)), images))
        for amount in (0.1, 0.5)
    )
    assert 0 < far < near < 1


def test_on_the_command_line(run: Path, weights: dict[str, Path]) -> None:
    arguments = ["--workers", 0, "--lpips-vgg", weights["lpips_vgg"]]
    few = write_images(run.parent / "few", 2, 64, 64)
    done = smalto_command("evaluate", few, "--tokenizer", run, *arguments)
    assert "LPIPS (VGG)" in done.stdout
    assert "WEBP" in done.stdout
    done = smalto_command(
        "evaluate",
        run.parent / "images",
        "--tokenizer",
        run,
        "--lpips-vgg",
        run / "config.json",
        check=False,
    )
    assert done.returncode == 1
    assert "is damaged or not a checkpoint of torch" in done.stderr


def test_other_images_are_not_taken_for_the_runs_own(run: Path, tmp_path: Path) -> None:
    """Numbered files have the same names everywhere."""
    evaluate = smalto.evaluate
    own = evaluate(run.parent / "images", run, device="cpu", workers=0).metrics
    assert own.measured_on == "held-out images"
    other = write_images(tmp_path / "other", 6, 60, 60)
    assert (
        evaluate(other, run, device="cpu", workers=0).metrics.measured_on
        == "images of another source than the training's"
    )
    (run.parent / "images").rename(tmp_path / "moved")
    moved = evaluate(tmp_path / "moved", run, device="cpu", workers=0).metrics
    assert (moved.measured_on, moved.psnr) == ("held-out images", own.psnr)


def test_a_checkpoint_named_from_inside_its_folder_knows_its_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run / "checkpoints")
    metrics = smalto.evaluate(
        run.parent / "images", "step-00000006", device="cpu", workers=0
    ).metrics
    assert metrics.measured_on == "held-out images"


def test_a_image_too_long_for_webp_is_measured_all_the_same(run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "long", 1, 16, 16500)
    metrics = smalto.evaluate(
        tmp_path / "long", run, longer_side=None, device="cpu", workers=0
    ).metrics
    assert [line.codec for line in metrics.codecs] == ["JPEG"]
    assert len(codec_rows(metrics)) == 3


def test_several_tokenizers_on_the_same_images(run: Path) -> None:
    folder = run.parent / "images"
    page = run.parent / "compared.html"
    torch.save(taming.tokenizer_state_dict(small_vqgan()), run.parent / "vqgan.pth")
    names = [str(run), "photos-f8", str(run.parent / "vqgan.pth")]
    compared = smalto.compare(folder, names, page, device="cpu", workers=0)
    rows = compared.as_json()
    assert [row["tokenizer"] for row in rows] == names
    assert len({row["num_images"] for row in rows}) == 1
    assert len({row["pixels_per_image"] for row in rows}) == 1  # cropped to all strides
    assert {row["measured_on"] for row in rows} == {"held-out images"}  # of the run
    single = smalto.evaluate(folder, run, device="cpu", workers=0).metrics
    assert rows[0]["num_images"] == single.num_images
    table = {label: cells for label, *cells in compared.table()}
    assert table[""] == names
    assert table["codes"] == ["16", "8,192", "16"]
    for label in ("PSNR", "SSIM", "MS-SSIM", "JPEG, as many bytes", "images/s", "memory"):
        assert "-" not in table[label], label
    assert "rFID" not in table
    html = page.read_text()
    assert html.count("data:image/webp;base64,") == 4 * single.num_images
    assert "photos-f8: " in html
    json.dumps(rows, allow_nan=False)


def test_comparisons_refuse_before_they_measure(tmp_path: Path, image_folder: Path) -> None:
    state = taming.tokenizer_state_dict(small_vqgan())
    encoder = {key: tensor for key, tensor in state.items() if not key.startswith("decoder.")}
    torch.save(encoder, tmp_path / "encoder.pth")
    with pytest.raises(ConfigError, match="has no decoder"):
        smalto.compare(image_folder, ["photos-f8", tmp_path / "encoder.pth"])
    with pytest.raises(ConfigError, match="got no tokenizer"):
        smalto.compare(image_folder, [])


def test_the_command_compares(run: Path) -> None:
    arguments = ["evaluate", "images", "--all", "--tokenizer", "run", "--tokenizer", "photos-f8"]
    done = smalto_command(*arguments, "--report", "r.html", cwd=run.parent)
    heading, codes, *_ = done.stdout.splitlines()
    assert heading.split() == ["run", "photos-f8"]
    assert codes.split() == ["codes", "16", "8,192"]
    assert done.stdout.strip().endswith("report: r.html")
    assert (run.parent / "r.html").is_file()


def small_vqgan() -> ImageTokenizer:
    torch.manual_seed(0)
    return TokenizerConfig(
        autoencoder=CNNAutoencoderConfig(
            latent_dim=4, ch=32, ch_mult=(1, 1), num_res_blocks=1, quant_conv_kernel=1
        ),
        quantizer=VectorQuantizerConfig(codebook_size=16, latent_dim=4),
    ).build()
