"""Fréchet distances against independent implementations; reference statistics."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import scipy.linalg
import torch

from smalto.core.errors import DataError, InputError
from smalto.metrics.frechet import (
    FeatureMoments,
    Gaussian,
    frechet_distance,
    read_statistics,
    write_statistics,
)


def features(number: int, dim: int, seed: int) -> numpy.ndarray:
    random = numpy.random.default_rng(seed)
    return random.standard_normal((number, dim)) @ random.standard_normal(
        (dim, dim)
    ) / dim**0.5 + random.standard_normal(dim)


def moments(vectors: numpy.ndarray, batch: int = 37) -> Gaussian:
    found = FeatureMoments(vectors.shape[1])
    for part in torch.from_numpy(vectors).split(batch):
        found.add(part)
    return found.gaussian()


@pytest.mark.parametrize(
    ("number", "dim"), [(500, 24), (3000, 64), (40, 64)]
)  # the last: fewer vectors than dimensions
def test_it_is_the_distance_that_scipy_computes(number: int, dim: int) -> None:
    a, b = features(number, dim, 0), features(number + 7, dim, 1)
    means, covariances = zip(
        *[(v.mean(axis=0), numpy.cov(v, rowvar=False)) for v in (a, b)], strict=True
    )
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((means[0] - means[1]) ** 2).sum() + numpy.trace(
        covariances[0] + covariances[1] - 2 * numpy.real(root)
    )
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(float(expected), rel=1e-6)


def test_it_is_the_distance_that_torchmetrics_computes() -> None:
    from torchmetrics.image.fid import _compute_fid

    a, b = moments(features(800, 32, 0)), moments(features(900, 32, 1))
    expected = float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_equal_collections_are_at_zero_and_batches_do_not_matter() -> None:
    vectors = features(300, 16, 0)
    assert frechet_distance(moments(vectors), moments(vectors, batch=300)) == pytest.approx(
        0, abs=1e-9
    )
    numpy.testing.assert_allclose(
        moments(vectors).covariance.numpy(), numpy.cov(vectors, rowvar=False), rtol=1e-10
    )
    assert moments(vectors).number == 300


def test_statistics_are_read_from_files_and_other_files_refused(tmp_path: Path) -> None:
    gaussian = moments(features(100, 8, 0))
    write_statistics(tmp_path / "stats.npz", gaussian)
    assert frechet_distance(read_statistics(tmp_path / "stats.npz"), gaussian) == pytest.approx(
        0, abs=1e-9
    )
    whole = (tmp_path / "stats.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        read_statistics(tmp_path / "cut.npz")
    with pytest.raises(DataError, match="cannot be read"):
        read_statistics(tmp_path / "nowhere.npz")
    numpy.savez(tmp_path / "other.npz", mu=numpy.zeros(3))
    with pytest.raises(DataError, match="does not hold reference statistics"):
        read_statistics(tmp_path / "other.npz")
    numpy.savez(
        tmp_path / "pickle.npz", mu=numpy.array([{"a": 1}], dtype=object), sigma=numpy.zeros((1, 1))
    )
    with pytest.raises(DataError, match="does not hold reference statistics"):
        read_statistics(tmp_path / "pickle.npz")
    numpy.savez(tmp_path / "shapes.npz", mu=numpy.zeros(3), sigma=numpy.zeros((2, 2)))
    with pytest.raises(DataError, match=r"got mu \[3\] and sigma \[2, 2\]"):
        read_statistics(tmp_path / "shapes.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError):
        read_statistics(tmp_path / "text.npz")


def test_too_few_vectors_and_other_dimensions_are_errors() -> None:
    with pytest.raises(InputError, match="got 1 vector; expected at least 2"):
        moments(features(1, 4, 0))
    with pytest.raises(InputError, match="come from different networks"):
        frechet_distance(moments(features(10, 4, 0)), moments(features(10, 5, 0)))
    with pytest.raises(InputError, match=r"expected vectors \[B, 4\]"):
        FeatureMoments(4).add(torch.zeros(2, 5))
