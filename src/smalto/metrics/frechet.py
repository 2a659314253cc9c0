"""Fréchet distance between two collections of images, in the features of a frozen network.

Heusel et al. 2017, arXiv 1706.08500.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from smalto.core.errors import DataError, InputError, describe
from smalto.core.files import read_regular

ENOUGH = 2048  # images; with fewer, the distance depends mostly on their number

_LARGEST_STATISTICS = 2**29  # bytes: of 8,192 features
_LARGEST = 1e30  # of a mean or a covariance


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of feature vectors.

    Attributes:
        mean: float64 [D].
        covariance: float64 [D, D].
        number: number of vectors; None: unknown.
    """

    mean: Tensor
    covariance: Tensor
    number: int | None = None


class FeatureMoments:
    """Streaming sums of vectors [B, D], in O(D²) memory.

    Attributes:
        number: number of vectors added.
    """

    def __init__(self, dim: int) -> None:
        self.number = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Add vectors [B, D].

        Raises:
            InputError: they have another shape.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self._sum):
            raise InputError(
                f"got {describe(vectors)}; expected vectors [B, {len(self._sum)}]. Pass the "
                "features of one network."
            )
        vectors = vectors.detach().double().cpu()
        self.number += len(vectors)
        self._sum += vectors.sum(dim=0)
        self._outer += vectors.T @ vectors

    def gaussian(self) -> Gaussian:
        """Return the mean and the unbiased covariance.

        Raises:
            InputError: there are fewer than two vectors.
        """
        if self.number < 2:
            raise InputError(
                f"got {'1 vector' if self.number else '0 vectors'}; expected at least 2 for a "
                "covariance. Add more images."
            )
        mean = self._sum / self.number
        covariance = (self._outer - self.number * torch.outer(mean, mean)) / (self.number - 1)
        return Gaussian(mean, covariance, self.number)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |mean_a - mean_b|² + trace(C_a + C_b - 2 (C_a C_b)^½), in float64.

    It is 0 for equal arguments.

    Raises:
        InputError: the arguments differ in dimension.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"got {len(a.mean)} and {len(b.mean)} dimensions, which come from different networks; "
            "expected the same number. Compute both with one network."
        )
    # C_a C_b has the same eigenvalues as C_a^½ C_b C_a^½, which is symmetric. Symmetric solvers
    # compute them to full precision.
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.covariance @ root)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + trace))


def read_statistics(path: str | Path) -> Gaussian:
    """Read reference statistics from an ``.npz`` file with ``mu`` [D] and ``sigma`` [D, D].

    pytorch-fid and ADM publish such files. No code from the file is run.

    Raises:
        DataError: the file cannot be read, or does not hold such statistics.
    """
    try:
        data = io.BytesIO(read_regular(path))
        with zipfile.ZipFile(data) as archive:
            if sum(member.file_size for member in archive.infolist()) > _LARGEST_STATISTICS:
                raise ValueError
        with numpy.load(data, allow_pickle=False) as file:
            if any(file[name].dtype.kind not in "fiu" for name in ("mu", "sigma")):
                raise TypeError
            mean, covariance = (
                torch.from_numpy(numpy.asarray(file[name], dtype=numpy.float64))
                for name in ("mu", "sigma")
            )
    except (zipfile.BadZipFile, zlib.error):
        raise DataError(
            f"the reference statistics {path} are damaged. Restore the file from a copy."
        ) from None
    except OSError as error:
        reason = error.strerror or "not an .npz file"
        raise DataError(
            f"the reference statistics {path} cannot be read: {reason}. Name an .npz file with "
            "mu [D] and sigma [D, D]."
        ) from None
    except (ValueError, KeyError, EOFError, TypeError):
        raise DataError(
            f"{path} does not hold reference statistics; expected an .npz file with mu [D] and "
            "sigma [D, D]. Name such a file."
        ) from None
    if (
        mean.ndim != 1
        or covariance.shape != (len(mean), len(mean))
        or not (mean.abs() < _LARGEST).all()
        or not (covariance.abs() < _LARGEST).all()
        or not torch.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6)
        or (covariance.diagonal() < 0).any()
    ):
        raise DataError(
            f"{path}: got mu {list(mean.shape)} and sigma {list(covariance.shape)}; expected "
            "finite mu [D] and a covariance sigma [D, D]. Name a file of statistics of one network."
        )
    return Gaussian(mean, covariance)


def write_statistics(path: str | Path, gaussian: Gaussian) -> None:
    """Write ``mu`` and ``sigma`` to an ``.npz`` file that ``read_statistics`` reads."""
    with open(path, "wb") as file:
        numpy.savez(file, mu=gaussian.mean.numpy(), sigma=gaussian.covariance.numpy())
