"""JPEG and WebP at a given size."""

from __future__ import annotations

import pytest
import torch

from smalto.evaluation.codecs import CODECS, compress_to_size
from smalto.images.tensors import to_tensor
from smalto.metrics import psnr
from tests.conftest import make_image


@pytest.mark.parametrize("codec", CODECS)
def test_a_file_is_as_large_as_it_may_be_and_no_larger(codec: str) -> None:
    image = to_tensor(make_image(0, 120, 160))
    sizes, quality = [], []
    for size in (1200, 1800, 4000):
        coded = compress_to_size(image, codec, size)
        assert coded is not None
        assert coded.image.shape == image.shape
        assert coded.image.dtype == torch.uint8
        assert 0.6 * size < coded.size <= size
        sizes.append(coded.size)
        quality.append(float(psnr(coded.image[None] / 127.5 - 1, image[None] / 127.5 - 1)))
    assert sizes == sorted(sizes)
    assert quality == sorted(quality)
    smallest = compress_to_size(image, codec, 10)
    assert smallest is not None
    assert smallest.size > 10  # no file is so small: the smallest one
    assert smallest.size < sizes[0]
