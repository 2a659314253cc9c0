"""Tests of `smalto convert`: to VAR's file and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smalto
import smalto.core.model_files as tokenizer_module
from smalto.autoencoders import CNNAutoencoderConfig
from smalto.core.errors import ConfigError, RunError
from smalto.interop.var import load_tokenizer, var_settings
from smalto.pipelines.convert import edits_of_var
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
    assert done.stdout.splitlines() == [
        str(tmp_path / "vae.pth"),
        "VAR builds this tokenizer with "
        "build_vae_var(V=12, Cvae=4, ch=32, patch_nums=(1, 2, 4), share_quant_resi=4, ...).",
        "train.py, line 86: set V=12, Cvae=4, ch=32, share_quant_resi=4. "
        "Keep patch_nums=args.patch_nums.",
        f"train.py, line 93: set vae_ckpt = {str(tmp_path / 'vae.pth')!r}.",
        "Run train.py with --pn=1_2_4 --patch_size=2.",
        "models/vqvae.py, lines 32-36: set ch_mult=(1, 1), num_res_blocks=1 in "
        "ddconfig = dict(...).",
    ]
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


def test_what_build_vae_var_does_not_pass_on_is_named(tmp_path: Path) -> None:
    config = TokenizerConfig(
        autoencoder=CNNAutoencoderConfig(ch=32, latent_dim=4, quant_conv_kernel=1),
        quantizer=MultiScaleVQConfig(
            scales=(1, 2),
            num_phis=None,
            phi_ratio=0.25,
            scale=VectorQuantizerConfig(codebook_size=12, latent_dim=4, metric="cosine"),
        ),
    )
    config.build().save(tmp_path / "tokenizer")
    notes = smalto.convert(tmp_path / "tokenizer", tmp_path / "vae.pth").notes
    assert "patch_nums=(1, 2), share_quant_resi=0" in notes[0]
    assert notes[3] == "Run train.py with --pn=1_2."
    assert notes[4:] == [
        "models/__init__.py, line 28: add using_znorm=True, quant_conv_ks=1, quant_resi=0.25 to "
        "VQVAE(...), because build_vae_var has no such arguments."
    ]


def test_only_the_file_name_is_to_edit_for_the_published_settings(tmp_path: Path) -> None:
    autoencoder = CNNAutoencoderConfig(ch=160, latent_dim=32)
    with torch.device("meta"):
        tokenizer = TokenizerConfig(autoencoder=autoencoder, quantizer=MultiScaleVQConfig()).build()
    settings = var_settings(tokenizer)
    assert settings.are_published
    assert edits_of_var(settings, tmp_path / "vae.pth") == [
        "VAR builds this tokenizer by default. "
        f"train.py, line 93: set vae_ckpt = {str(tmp_path / 'vae.pth')!r}."
    ]


@pytest.mark.parametrize("ratio", [1e-9, 1e-6])
def test_a_phi_that_var_does_not_build_is_refused(ratio: float, tmp_path: Path) -> None:
    config = TokenizerConfig(
        autoencoder=CNNAutoencoderConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, latent_dim=4),
        quantizer=MultiScaleVQConfig(
            scales=(1, 2),
            phi_ratio=ratio,
            scale=VectorQuantizerConfig(codebook_size=12, latent_dim=4),
        ),
    )
    config.build().save(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"phi_ratio .*; expected 0 or a value above 1e-06"):
        smalto.convert(tmp_path / "tokenizer", tmp_path / "vae.pth")
    assert not (tmp_path / "vae.pth").exists()


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there.pth").write_bytes(b"mine")
    with pytest.raises(RunError, match="exists already"):
        smalto.convert(folder, tmp_path / "there.pth")
    assert (tmp_path / "there.pth").read_bytes() == b"mine"
    smalto.convert(folder, tmp_path / "there.pth", overwrite=True)
    with pytest.raises(RunError, match=r"ends with \.pth"):
        smalto.convert(folder, tmp_path / "vae.bin")
    with pytest.raises(ConfigError, match="expected one of var"):
        smalto.convert(folder, tmp_path / "x.pth", "vqgan")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"3 scales|of 3 scales"):
        smalto.convert(tmp_path / "there.pth", tmp_path / "new", "smalto")
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").touch()
    with pytest.raises(RunError, match="other files in it"):
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
    assert "--patch-nums" in done.stderr


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
