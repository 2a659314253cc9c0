"""The frozen networks that an evaluation uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from smalto.core.errors import ConfigError, MissingExtra
from smalto.core.files import file_sha256
from smalto.features.frozen import PooledNetwork
from smalto.features.inception import Inception
from smalto.features.lite0 import Lite0
from smalto.features.lpips import LPIPS
from smalto.metrics.frechet import Gaussian, read_statistics


@dataclass(frozen=True)
class FeatureNetworks:
    """The networks that are available, and a reference for Fréchet distances.

    Attributes:
        reference: (statistics, where they come from); None: the images that were encoded.
    """

    lite0: Lite0 | None = None
    lpips: LPIPS | None = None
    inception: Inception | None = None
    reference: tuple[Gaussian, str] | None = None

    @classmethod
    def open(
        cls,
        device: torch.device,
        *,
        reference_stats: str | Path | None = None,
        inception_weights: str | Path | None = None,
        lpips_vgg: str | Path | None = None,
    ) -> Self:
        """Open lite0 if it is installed, the others from files.

        Raises:
            DataError: a file holds something else.
            ConfigError: the reference statistics are of a network that was not named.
        """
        try:
            lite0 = Lite0().to(device)
        except MissingExtra:
            lite0 = None
        lpips = LPIPS(lpips_vgg).to(device) if lpips_vgg else None
        inception = Inception(inception_weights).to(device) if inception_weights else None
        reference = None
        if reference_stats:
            statistics = read_statistics(reference_stats)
            sha256 = file_sha256(reference_stats)
            reference = statistics, f"{Path(reference_stats).name} (sha256 {sha256})"
            width = len(statistics.mean)
            networks = [network for network in (lite0, inception) if network is not None]
            if width not in [network.dim for network in networks]:
                available = ", ".join(f"{n.name} with {n.dim}" for n in networks) or "no network"
                raise ConfigError(
                    f"got statistics of {width} features in {reference_stats}; expected those of "
                    f"{available}. Those of Inception have 2048: name its weights with "
                    "--inception-weights."
                )
        return cls(lite0, lpips, inception, reference)

    def pooled(self) -> list[tuple[str, PooledNetwork]]:
        """Return the networks for Fréchet distances, and the name of each distance."""
        both: list[tuple[str, PooledNetwork | None]] = [
            ("lite0_fid", self.lite0),
            ("rfid", self.inception),
        ]
        return [(name, network) for name, network in both if network is not None]

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each network's weights, by name."""
        networks = [n for n in (self.lite0, self.lpips, self.inception) if n is not None]
        return {network.name: network.sha256 for network in networks}
