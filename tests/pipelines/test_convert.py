"""smalto convert: to VAR's file and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smalto
import smalto.tokenizer.saving as tokenizer_module
from smalto.autoencoders import CNNAutoencoderConfig
from smalto.core.errors import ConfigError, RunError
from smalto.interop.var import load_tokenizer
from smalto.quantizers import MultiScaleVQConfig, VectorQuantizerConfig
from smalto.tokenizer import TokenizerConfig
from tests.conftest import smalto_command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = TokenizerConfig(
        autoencoder=CNNAutoencoderConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, latent_dim=4),
        quantizer=MultiScaleVQConfig(
            scales=(1, 2, 4), scale=VectorQuantizerConfig(codebook_size=12, latent_dim=4)
        ),
    )
    config.build().save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_there_and_back_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    done = smalto_command("convert", folder, "--out", tmp_path / "vae.pth")
    assert "VQVAE(vocab_size=12, z_channels=4, ch=32, v_patch_nums=(1, 2, 4))" in done.stdout
    assert "ddconfig = dict(..., ch_mult=(1, 1), num_res_blocks=1)" in done.stdout
    state = torch.load(tmp_path / "vae.pth", weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    expected = smalto.load(folder).encode(images)
    assert torch.equal(load_tokenizer(state, [1, 2, 4]).encode(images), expected)
    back = tmp_path / "back"
    done = smalto_command(
        "convert", tmp_path / "vae.pth", "--to", "smalto", "--patch-nums", "1,2,4", "--out", back
    )
    assert "12 codes, scales 1x1 + 2x2 + 4x4" in done.stdout
    assert torch.equal(smalto.load(back).encode(images), expected)
    assert "4x4: 21 tokens for 8 x 8 pixels" in smalto_command("info", back).stdout


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there.pth").write_bytes(b"mine")
    with pytest.raises(RunError, match="exists already"):
        smalto.convert(folder, tmp_path / "there.pth")
    assert (tmp_path / "there.pth").read_bytes() == b"mine"
    smalto.convert(folder, tmp_path / "there.pth", overwrite=True)
    with pytest.raises(RunError, match=r"ends with \.pth"):
        smalto.convert(folder, tmp_path / "vae.bin")
    with pytest.raises(ConfigError, match="to must be"):
        smalto.convert(folder, tmp_path / "x.pth", "onnx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"3 scales|of 3 scales"):
        smalto.convert(tmp_path / "there.pth", tmp_path / "new", "smalto")
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").touch()
    with pytest.raises(RunError, match="other things in it"):
        smalto.convert(
            tmp_path / "there.pth",
            tmp_path / "full",
            "smalto",
            overwrite=True,
            patch_nums=[1, 2, 4],
        )
    smalto.SimpleVQVAE().save(tmp_path / "simple")
    with pytest.raises(ConfigError, match="VAR cannot hold this tokenizer"):
        smalto.convert(tmp_path / "simple", tmp_path / "y.pth")
    assert not (tmp_path / "y.pth").exists()
    done = smalto_command(
        "convert",
        folder,
        "--to",
        "smalto",
        "--patch-nums",
        "a",
        "--out",
        tmp_path / "z",
        check=False,
    )
    assert done.returncode == 1
    assert "--patch-nums takes whole numbers" in done.stderr


def test_an_interrupted_conversion_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smalto.convert(folder, tmp_path / "vae.pth")
    out = tmp_path / "out"
    smalto.convert(tmp_path / "vae.pth", out, "smalto", patch_nums=[1, 2, 4])
    before, write = smalto.load(out).fingerprint(), tokenizer_module.write_atomic

    def interrupted(path: Path, data: str | bytes) -> None:
        if path.name == "config.json":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(tokenizer_module, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smalto.convert(tmp_path / "vae.pth", out, "smalto", overwrite=True, patch_nums=[1, 3, 4])
    with pytest.raises(KeyboardInterrupt):
        smalto.convert(tmp_path / "vae.pth", tmp_path / "fresh", "smalto", patch_nums=[1, 3, 4])
    monkeypatch.undo()
    assert smalto.load(out).fingerprint() == before
    assert not (tmp_path / "fresh").exists()
    smalto.convert(tmp_path / "vae.pth", out, "smalto", overwrite=True, patch_nums=[1, 3, 4])
    assert smalto.load(out).quantize.scales == ((1, 1), (3, 3), (4, 4))


def test_weights_beside_another_config_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    smalto.convert(folder, tmp_path / "vae.pth")
    smalto.convert(tmp_path / "vae.pth", tmp_path / "other", "smalto", patch_nums=[1, 3, 4])
    (folder / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    with pytest.raises(
        RunError, match=r"does not fit config\.json beside it: it was written with another"
    ):
        smalto.load(folder)


def test_a_refused_conversion_makes_nothing(tmp_path: Path) -> None:
    smalto.SimpleVQVAE().save(tmp_path / "simple")
    with pytest.raises(ConfigError, match="cannot hold"):
        smalto.convert(tmp_path / "simple", tmp_path / "new" / "vae.pth")
    assert not (tmp_path / "new").exists()
