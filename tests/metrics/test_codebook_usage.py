"""Metrics against independent implementations."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from smalto.core.errors import InputError
from smalto.metrics import CodebookMeter, perplexity, psnr, ssim


def images(seed: int) -> torch.Tensor:
    return torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_is_scikit_images() -> None:
    a, b = images(0), images(0) * 0.9
    expected = [
        peak_signal_noise_ratio(x.double().numpy(), y.double().numpy(), data_range=2)
        for x, y in zip(a, b, strict=True)
    ]
    numpy.testing.assert_allclose(psnr(b, a), expected, rtol=1e-5)
    assert psnr(a, a).tolist() == pytest.approx([100] * 3)
    torch.testing.assert_close(
        psnr(b + 5, a), psnr(torch.ones_like(a), a)
    )  # the reconstruction is clamped


def test_ssim_is_scikit_images() -> None:
    a = images(0)
    b = (a + 0.3 * images(1)).clamp(-1, 1)
    settings = {
        "channel_axis": 0,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 1,
    }
    unit = [((x.double() + 1) / 2).numpy() for x in (a, b)]
    expected = [structural_similarity(x, y, **settings) for x, y in zip(*unit, strict=True)]
    numpy.testing.assert_allclose(ssim(b, a), expected, atol=1e-5)
    torch.testing.assert_close(ssim(a, a), torch.ones(3))


def test_perplexity_of_known_histograms() -> None:
    assert perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([9, 0, 0])) == pytest.approx(1)
    assert perplexity(torch.zeros(4, dtype=torch.int64)) == 0
    assert perplexity(torch.tensor([1, 3])) == pytest.approx(
        math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    )


def test_usage_looks_at_32_tokens_per_code() -> None:
    tokens = torch.arange(8).repeat(10)
    meter = CodebookMeter(16)
    meter.add(tokens)
    assert meter.usage() == (0.5, 80)  # fewer than 32·16: all of them, and W says so
    for _ in range(30):
        meter.add(torch.zeros(10_000, dtype=torch.int64))
    share, window = meter.usage()
    assert window == 512
    assert share < 0.2  # codes 1 to 7 are 70 of 300,080 tokens: a window of 512 rarely meets them
    assert torch.equal(
        meter.histogram,
        torch.bincount(torch.cat([tokens, torch.zeros(300_000, dtype=torch.int64)]), minlength=16),
    )


def test_usage_does_not_depend_on_the_batches() -> None:
    tokens = torch.randint(64, (9000,))
    whole, parts = CodebookMeter(64), CodebookMeter(64)
    whole.add(tokens)
    for part in tokens.split(1000):
        parts.add(part.view(10, 100))
    assert whole.usage() == parts.usage()
    assert whole.perplexity() == parts.perplexity()


def test_nonsense_is_named() -> None:
    a = images(0)
    for wrong in (a[:1], a[0], (a * 100).to(torch.uint8)):
        with pytest.raises(InputError, match="of one shape"):
            psnr(wrong, a)
    with pytest.raises(InputError, match="sides of at least 11"):
        ssim(a[..., :10], a[..., :10])
    assert ssim(a[:0], a[:0]).shape == (0,)
    with pytest.raises(InputError, match=r"got tokens from 0 to 4; expected values in \[0, 4\)"):
        CodebookMeter(4).add(torch.arange(5).to(torch.uint16))
