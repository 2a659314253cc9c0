"""Weight files of other projects wherever a tokenizer is expected: recognized, never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smalto
from smalto.autoencoders import CNNAutoencoderConfig
from smalto.core.errors import ConfigError, DataError
from smalto.interop import taming
from smalto.interop.open_tokenizer import recognize
from smalto.quantizers import VectorQuantizerConfig
from smalto.tokenizer import TokenizerConfig
from tests.conftest import smalto_command, write_images
from tests.parity.golden import read, weights

PROJECTS = {"taming_a": "taming-transformers", "llamagen_a": "LlamaGen", "var_tokenizer_c": "VAR"}


def written(name: str, folder: Path) -> Path:
    path = folder / f"{name}.pth"
    torch.save({"epoch": 3, "trainer": {"model": weights(read(name)[0])}}, path)
    return path


@pytest.mark.parametrize("name", PROJECTS)
def test_the_project_is_recognized(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    assert recognize(path).project == PROJECTS[name]
    assert smalto.load(path).fingerprint() == smalto.load(str(path)).fingerprint()


def test_jobs_take_a_weight_file(tmp_path: Path) -> None:
    path = written("taming_a", tmp_path)
    write_images(tmp_path / "photos", 3, 64, 96)
    done = smalto_command(
        "tokenize", "photos", "--tokenizer", path, "--out", "t.lance", cwd=tmp_path
    )
    assert "taming-transformers, 256 codes, 16 x 16 pixels per token" in done.stderr
    store = smalto.TokenStore.open(tmp_path / "t.lance")
    assert store.header.fingerprint == smalto.load(path).fingerprint()
    assert len(smalto.decode(store.path, tmp_path / "decoded")) == 3
    assert (
        smalto.reconstruct(
            tmp_path / "photos" / "photo00.png", path, tmp_path / "back.png"
        ).num_tokens
        == 24
    )
    described = smalto.info(path)
    assert (described["kind"], described["codebook size"]) == ("tokenizer", 256)


def test_convert_there_and_back(tmp_path: Path) -> None:
    path = written("taming_a", tmp_path)
    own = smalto.convert(path, tmp_path / "own", "smalto")
    assert "256 codes" in own.notes[0]
    back = smalto.convert(own.path, tmp_path / "back.pth", "taming")
    state = torch.load(back.path, weights_only=True)
    expected = weights(read("taming_a")[0])
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    with pytest.raises(
        ConfigError, match="expected one of var, llamagen, taming, diffusers, maskgit, onnx, smalto"
    ):
        smalto.convert(own.path, tmp_path / "no.pth", "vqgan")  # type: ignore[arg-type]


def test_files_of_other_projects_are_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match="VAR, LlamaGen, taming-transformers, diffusers, tr"):
        smalto.load(tmp_path / "other.pth")
    both = weights(read("taming_a")[0]) | weights(read("llamagen_a")[0])
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(DataError, match="LlamaGen and taming-transformers could have written"):
        smalto.load(tmp_path / "both.pth")


def test_the_format_is_never_guessed(tmp_path: Path) -> None:
    """The decoders of taming and of transformers number their levels in opposite directions."""
    one_level = TokenizerConfig(
        autoencoder=CNNAutoencoderConfig(
            latent_dim=4, ch=32, ch_mult=(1,), num_res_blocks=1, quant_conv_kernel=1
        ),
        quantizer=VectorQuantizerConfig(codebook_size=16, latent_dim=4),
    ).build()
    path = tmp_path / "one.pth"
    torch.save(taming.tokenizer_state_dict(one_level), path)
    with pytest.raises(DataError, match="--format taming or transformers"):
        smalto.load(path)
    done = smalto_command(
        "convert", path, "--to", "smalto", "--format", "taming", "--out", "own", cwd=tmp_path
    )
    assert "16 codes" in done.stdout
    assert smalto.load(tmp_path / "own").fingerprint() == smalto.load(path, "taming").fingerprint()
    assert smalto.load(path, format="transformers").config.quantizer_kind == "logit"
    with pytest.raises(ConfigError, match="got format 'vqgan'; expected one of var, llamagen"):
        smalto.load(path, format="vqgan")  # type: ignore[arg-type]
