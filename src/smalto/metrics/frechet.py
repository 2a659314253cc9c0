"""Fréchet distance between two collections of images, as a frozen network sees them (Heusel et al. 2017, arXiv 1706.08500)."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from smalto.core.errors import DataError, InputError, describe

ENOUGH = 2048  # images; with fewer the distance is mostly a matter of how many there are


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] in float64, and of how many vectors (None: unknown)."""

    mean: Tensor
    covariance: Tensor
    number: int | None = None


class FeatureMoments:
    """Adds up vectors [B, D] as they come, in O(D²) memory."""

    def __init__(self, dim: int) -> None:
        self.number = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Take in vectors [B, D]."""
        if vectors.ndim != 2 or vectors.shape[1] != len(self._sum):
            raise InputError(f"vectors must be [B, {len(self._sum)}]; got {describe(vectors)}.")
        vectors = vectors.detach().double().cpu()
        self.number += len(vectors)
        self._sum += vectors.sum(dim=0)
        self._outer += vectors.T @ vectors

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises InputError for fewer than two vectors."""
        if self.number < 2:
            raise InputError(
                f"a covariance needs at least 2 vectors; there {'is 1' if self.number else 'is none'}."
            )
        mean = self._sum / self.number
        covariance = (self._outer - self.number * torch.outer(mean, mean)) / (self.number - 1)
        return Gaussian(mean, covariance, self.number)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|² + trace(C_a + C_b - 2 (C_a C_b)^½), in float64; 0 for equal ones.

    Raises:
        InputError: they differ in dimension.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"the two have {len(a.mean)} and {len(b.mean)} dimensions: they come from different networks."
        )
    # C_a C_b has the eigenvalues of the symmetric C_a^½ C_b C_a^½, which symmetric solvers give to full precision.
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.covariance @ root)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + trace))


def read_statistics(path: str | Path) -> Gaussian:
    """Reference statistics from an ``.npz`` file with ``mu`` [D] and ``sigma`` [D, D], as pytorch-fid and ADM publish them.

    Raises:
        DataError: not there, or something else. Nothing in the file is run.
    """
    try:
        with open(path, "rb") as stream, numpy.load(stream, allow_pickle=False) as file:
            mean, covariance = (
                torch.from_numpy(numpy.asarray(file[name], dtype=numpy.float64))
                for name in ("mu", "sigma")
            )
    except (zipfile.BadZipFile, zlib.error):
        raise DataError(f"the reference statistics {path} are damaged.") from None
    except OSError as error:
        raise DataError(
            f"the reference statistics {path} cannot be read ({error.strerror or 'not an .npz file'})."
        ) from None
    except (ValueError, KeyError, EOFError, TypeError):
        raise DataError(
            f"{path} holds no reference statistics: it should be an .npz file with mu [D] and sigma [D, D]."
        ) from None
    if (
        mean.ndim != 1
        or covariance.shape != (len(mean), len(mean))
        or not (mean.isfinite().all() and covariance.isfinite().all())
    ):
        raise DataError(
            f"{path}: mu is {list(mean.shape)} and sigma {list(covariance.shape)}; they should be finite [D] and [D, D]."
        )
    return Gaussian(mean, covariance)


def write_statistics(path: str | Path, gaussian: Gaussian) -> None:
    """Write ``mu`` and ``sigma`` for ``read_statistics``."""
    with open(path, "wb") as file:
        numpy.savez(file, mu=gaussian.mean.numpy(), sigma=gaussian.covariance.numpy())
