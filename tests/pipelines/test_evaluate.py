"""What evaluation measures, and what it says of every figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

import smalto
from smalto.core.errors import ConfigError
from smalto.evaluation.evaluator import Networks, compare
from smalto.evaluation.formatting import codec_rows, figure_rows
from smalto.metrics.frechet import FeatureMoments, write_statistics
from smalto.training.recipe import Recipe
from tests.conftest import smalto_command, write_pictures
from tests.features.test_networks import inception_state, lpips_state


@pytest.fixture
def run(tmp_path: Path, tiny_recipe: Recipe) -> Path:
    smalto.train(write_pictures(tmp_path / "pictures", 6, 176, 180), tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    return tmp_path / "run"


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Path]:
    torch.save(lpips_state(), tmp_path / "lpips.pth")
    torch.save(inception_state()[0], tmp_path / "inception.pth")
    return {"lpips_vgg": tmp_path / "lpips.pth", "inception_weights": tmp_path / "inception.pth"}


def test_every_figure_says_over_how_many_pictures(run: Path, weights: dict[str, Path]) -> None:
    pictures = run.parent / "pictures"
    figures = smalto.evaluate(pictures, run, everything=True, device="cpu", workers=0, **weights).figures
    for name in ("psnr", "ssim", "ms_ssim", "lite0_distance", "lpips", "lite0_fid", "rfid"):
        assert numpy.isfinite(figures[name])
        assert figures[f"{name}_num_images"] == 6
    assert set(figures["networks"]) == {"lite0", "lpips-vgg", "inception"}
    assert all(len(digest) == 64 for digest in figures["networks"].values())
    assert figures["rfid_reference"] == figures["lite0_fid_reference"] == "the pictures that were encoded"
    rows = dict(figure_rows(figures))
    for label in ("PSNR", "SSIM", "MS-SSIM", "lite0 distance", "LPIPS (VGG)", "lite0-FID", "rFID"):
        assert "N = 6" in rows[label]
    for label in ("lite0-FID", "rFID"):
        assert "fewer than 2,048: compare it with nothing else" in rows[label]
    json.dumps(figures, allow_nan=False)


def test_other_codecs_at_as_many_bytes_stand_beside_it(run: Path) -> None:
    figures = smalto.evaluate(run.parent / "pictures", run, everything=True, device="cpu", workers=0).figures
    assert [line["codec"] for line in figures["codecs"]] == ["JPEG", "WEBP"]
    for line in figures["codecs"]:
        assert line["psnr_num_images"] == 6
        assert line["lite0_distance_num_images"] == 6
    heading, own, *others = codec_rows(figures)
    assert heading[3:] == ("PSNR", "SSIM", "lite0 distance")
    assert own[0] == "these tokens"
    assert own[3] == f"{figures['psnr']:.2f} dB"
    assert len(others) == 2


def test_fid_can_be_measured_from_published_statistics(run: Path, weights: dict[str, Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for dim in (2048, 16):
        moments = FeatureMoments(dim)
        moments.add(torch.randn(20, dim, generator=generator))
        write_statistics(tmp_path / f"{dim}.npz", moments.gaussian())
    pictures = run.parent / "pictures"
    figures = smalto.evaluate(
        pictures, run, everything=True, device="cpu", workers=0, reference_stats=tmp_path / "2048.npz", **weights
    ).figures
    assert figures["rfid_reference"].startswith("2048.npz (sha256 ")
    assert figures["lite0_fid_reference"] == "the pictures that were encoded"
    with pytest.raises(ConfigError, match=r"statistics of 16 features.*lite0 with 1280.*--inception-weights"):
        smalto.evaluate(pictures, run, workers=0, device="cpu", reference_stats=tmp_path / "16.npz")


def test_small_and_grey_pictures_are_measured_by_what_fits_them() -> None:
    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    networks = Networks.open(torch.device("cpu"))
    assert set(compare(noise(2, 3, 8, 8), noise(2, 3, 8, 8), networks)) == {"psnr"}
    assert set(compare(noise(2, 3, 16, 16), noise(2, 3, 16, 16), networks)) == {"psnr", "ssim"}
    assert set(compare(noise(2, 3, 40, 40), noise(2, 3, 40, 40), networks)) == {"psnr", "ssim", "lite0_distance"}
    assert set(compare(noise(2, 1, 176, 176), noise(2, 1, 176, 176), networks)) == {"psnr", "ssim", "ms_ssim"}


def test_ms_ssim_falls_with_noise() -> None:
    from smalto.metrics import ms_ssim

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 192, 200, generator=generator) * 2 - 1
    assert float(ms_ssim(images, images)) == pytest.approx(1, abs=1e-5)
    near, far = (float(ms_ssim((images + amount * torch.randn(images.shape, generator=generator)), images)) for amount in (0.1, 0.5))
    assert 0 < far < near < 1


def test_on_the_command_line(run: Path, weights: dict[str, Path]) -> None:
    arguments = ["--all", "--workers", 0, "--lpips-vgg", weights["lpips_vgg"], "--inception-weights", weights["inception_weights"]]
    done = smalto_command("evaluate", run.parent / "pictures", "--tokenizer", run, *arguments)
    assert "LPIPS (VGG)" in done.stdout
    assert "WEBP" in done.stdout
    done = smalto_command("evaluate", run.parent / "pictures", "--tokenizer", run, "--lpips-vgg", run / "config.json", check=False)
    assert done.returncode == 1
    assert "damaged or no checkpoint" in done.stderr


def test_other_pictures_are_not_taken_for_the_runs_own(run: Path, tmp_path: Path) -> None:
    """Numbered files have the same names everywhere."""
    evaluate = smalto.evaluate
    own = evaluate(run.parent / "pictures", run, device="cpu", workers=0).figures
    assert own["measured_on"] == "held-out pictures"
    other = write_pictures(tmp_path / "other", 6, 60, 60)
    assert evaluate(other, run, device="cpu", workers=0).figures["measured_on"] == "pictures of another source than the training's"
    (run.parent / "pictures").rename(tmp_path / "moved")
    moved = evaluate(tmp_path / "moved", run, device="cpu", workers=0).figures
    assert (moved["measured_on"], moved["psnr"]) == ("held-out pictures", own["psnr"])


def test_a_checkpoint_named_from_inside_its_folder_knows_its_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    figures = smalto.evaluate(run.parent / "pictures", "step-00000006", device="cpu", workers=0).figures
    assert figures["measured_on"] == "held-out pictures"


def test_a_picture_too_long_for_webp_is_measured_all_the_same(run: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "long", 1, 16, 16500)
    figures = smalto.evaluate(tmp_path / "long", run, longer_side=None, device="cpu", workers=0).figures
    assert [line["codec"] for line in figures["codecs"]] == ["JPEG"]
    assert len(codec_rows(figures)) == 3
