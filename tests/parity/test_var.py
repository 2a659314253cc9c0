"""VAR's tokenizers: the same weights give the same tokens, images, losses and gradients."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import smalto
from smalto.autoencoders import CNNAutoencoderConfig
from smalto.core.errors import ConfigError, DataError, RunError, SmaltoError
from smalto.interop.var import (
    HITS,
    VARSettings,
    constructor_values,
    load_tokenizer,
    obstacles,
    tokenizer_state_dict,
    var_settings,
)
from smalto.quantizers import MultiScaleVQConfig
from smalto.quantizers.multiscale import phi_of_scale
from smalto.tokenizer import ImageTokenizer, TokenizerConfig
from tests.parity.golden import GOLDEN, near, read, weights


def loaded(name: str) -> tuple[ImageTokenizer, dict[str, Any], dict[str, torch.Tensor]]:
    config, tensors = read(f"var_tokenizer_{name}")
    settings = {key: config[key] for key in ("using_znorm", "quant_resi", "beta")}
    return load_tokenizer(weights(config), config["v_patch_nums"], **settings), config, tensors


def blocks_of(
    tensors: dict[str, torch.Tensor], number: int, prefix: str = ""
) -> list[torch.Tensor]:
    return [tensors[f"{prefix}idx.{k}"] for k in range(number)]


@pytest.mark.parametrize("name", ["a", "b"])
def test_small_tokenizers(name: str) -> None:
    tokenizer, config, expected = loaded(name)
    number = len(config["v_patch_nums"])
    images, blocks = expected["image"], blocks_of(expected, number)
    with torch.no_grad():
        features = tokenizer.encoder(images)
        near(features, expected["feature"])
        own = tokenizer.img_to_idxBl(images)
        assert [torch.equal(a, b) for a, b in zip(own, blocks, strict=True)] == [True] * number
        layout, tokens = tokenizer.layout(*images.shape[2:]), torch.cat(own, 1)
        for k, length in enumerate(torch.tensor(layout.lengths).cumsum(0).tolist()):
            near(tokenizer.quantize.decode(tokens[:, :length], layout), expected[f"f_hat.{k}"])
        near(tokenizer.idxBl_to_var_input(own), expected["var_input"])
        near(tokenizer.idxBl_to_img(own), expected["reconstruction"])
        images = tokenizer.idxBl_to_img(own, last_one=False)
        assert len(images) == number
        near(images[0], expected["reconstruction_scale0"])
        near(images[-1], expected["reconstruction"])
        near(tokenizer.idxBl_to_img(own[:1]), expected["reconstruction_scale0"])


@pytest.mark.parametrize("name", ["a", "b"])
def test_training_loss_and_gradients(name: str) -> None:
    tokenizer, _, expected = loaded(name)
    out = tokenizer.train()(expected["image"])
    near(out.vq_loss[None], expected["train.vq_loss"])
    loss = F.mse_loss(out.reconstruction, expected["image"]) + out.vq_loss
    near(loss[None], expected["train.loss"])
    loss.backward()
    own = {
        "encoder.conv_in.weight": tokenizer.encoder.conv_in.weight,
        "quantize.embedding.weight": tokenizer.quantize.scale.embedding.weight,
        "quantize.quant_resi.qresi.weight": tokenizer.quantize.phis[0].weight,
        "quantize.quant_resi.qresi_ls.0.weight": tokenizer.quantize.phis[0].weight,
    }
    gradients = {
        key.removeprefix("train.grad."): tensor
        for key, tensor in expected.items()
        if key.startswith("train.grad.")
    }
    assert len(gradients) == 3
    for key, gradient in gradients.items():
        near(own[key].grad, gradient)


def test_images_that_are_not_square() -> None:
    tokenizer, config, expected = loaded("a")
    grids = config["extra"][0]["patch_hws"]
    images, blocks = expected["extra0.image"], blocks_of(expected, len(grids), "extra0.")
    own = tokenizer.img_to_idxBl(images, grids)
    assert all(torch.equal(a, b) for a, b in zip(own, blocks, strict=True))
    layout = smalto.TokenLayout(tuple(map(tuple, grids)))
    with torch.no_grad():
        near(tokenizer.quantize.decode(torch.cat(own, 1), layout), expected["extra0.f_hat_last"])
        near(tokenizer.idxBl_to_img(own, grids), expected["extra0.reconstruction"])
        assert tokenizer.idxBl_to_var_input(own, grids).shape == (1, 6 + 12 + 24, 16)
        images = tokenizer.idxBl_to_img(own, grids, last_one=False)
        assert torch.equal(tokenizer.idxBl_to_img(own[:2], grids), images[1])


def test_the_ten_published_scales() -> None:
    tokenizer, config, expected = loaded("c")
    assert list(phi_of_scale(10, 4)) == config["phi_of_scale"] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    images = expected["image_int8"].float() / 127
    with torch.no_grad():
        near(tokenizer.encoder(images), expected["feature"])
        own = tokenizer.img_to_idxBl(images)
        assert all(torch.equal(a, b) for a, b in zip(own, blocks_of(expected, 10), strict=True))
        near(
            tokenizer.quantize.decode(torch.cat(own, 1), tokenizer.layout(256, 256)),
            expected["f_hat_last"],
        )
        near(tokenizer.idxBl_to_var_input(own), expected["var_input"])


def test_which_phi_a_scale_takes() -> None:
    assert phi_of_scale(3, 4) == (0, 2, 3)
    assert phi_of_scale(5, 4) == (0, 1, 2, 2, 3)
    assert phi_of_scale(1, 4) == (0,)
    assert phi_of_scale(5, 1) == (0,) * 5
    assert phi_of_scale(5, 5) == (0, 1, 2, 3, 4)
    assert phi_of_scale(5, 0) == ()


def official() -> dict[str, Any]:
    return json.loads((GOLDEN / "vae_ch160v4096z32.json").read_text())


def official_config(**changes: Any) -> TokenizerConfig:
    autoencoder = CNNAutoencoderConfig(ch=160, latent_dim=32)
    return TokenizerConfig(autoencoder=autoencoder, quantizer=MultiScaleVQConfig(**changes))


def test_the_published_keys_and_shapes() -> None:
    with torch.device("meta"):
        tokenizer = official_config().build()
    names = {key: list(tensor.shape) for key, tensor in _meta_state(tokenizer).items()}
    assert len(names) == 324
    assert names == official()["shapes"]
    assert constructor_values(tokenizer) == ({"ch": 160}, {})


def _meta_state(tokenizer: ImageTokenizer) -> dict[str, torch.Tensor]:
    from smalto.interop.var import var_names

    own, names = tokenizer.state_dict(), var_names(tokenizer)
    quantizer = tokenizer.quantize
    return {name: own[key] for key, name in names.items()} | {
        HITS: torch.zeros(len(quantizer.scales), quantizer.codebook_size)
    }


SMALL: dict[str, Any] = {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "latent_dim": 4}


def small(autoencoder: dict[str, Any] | None = None, **quantizer: Any) -> ImageTokenizer:
    scale = {"codebook_size": 12, "latent_dim": 4} | quantizer.pop("scale", {})
    config = TokenizerConfig(
        autoencoder=CNNAutoencoderConfig(**SMALL | (autoencoder or {})),
        quantizer=MultiScaleVQConfig(**{"scales": (1, 2, 4), "scale": scale} | quantizer),
    )
    torch.manual_seed(0)
    return config.build().eval()


@pytest.mark.parametrize(
    "tokenizer",
    [
        small(),
        small(num_phis=1),
        small(num_phis=None),
        small(phi_ratio=0.0),
        small(scale={"codebook": "ema"}),
        small(scale={"codebook": "projected"}),
        small(scale={"metric": "cosine", "beta": 0.1}),
        small({"attention": False, "quant_conv_kernel": 1, "in_channels": 1, "num_res_blocks": 2}),
        small({"ch_mult": (1, 2, 1)}),
    ],
    ids=[
        "partial",
        "shared",
        "own",
        "no-phi",
        "ema",
        "projected",
        "cosine",
        "other-network",
        "other-levels",
    ],
)
def test_round_trip_is_bitwise(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    state, config = tokenizer_state_dict(tokenizer), tokenizer.config.quantizer
    torch.save(state, tmp_path / "vae.pth")
    settings = {
        "using_znorm": config.scale.metric == "cosine",
        "quant_resi": config.phi_ratio,
        "beta": config.scale.beta,
    }
    back = load_tokenizer(tmp_path / "vae.pth", [1, 2, 4], **settings)
    images = (
        torch.rand(2, tokenizer.in_channels, 4 * tokenizer.stride, 4 * tokenizer.stride) * 2 - 1
    )
    own, other = tokenizer.folded().eval(), back
    assert torch.equal(own.encode(images), other.encode(images))
    assert torch.equal(tokenizer.encode(images), other.encode(images))
    assert torch.equal(own(images).reconstruction, other(images).reconstruction)
    again = tokenizer_state_dict(back)
    assert list(again) == list(state)
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert back.config.autoencoder == tokenizer.config.autoencoder
    back.save(tmp_path / "folder")
    assert torch.equal(smalto.load(tmp_path / "folder").encode(images), other.encode(images))


def test_a_loaded_tokenizer_has_weights_of_its_own() -> None:
    state = tokenizer_state_dict(small())
    back, before = load_tokenizer(state, [1, 2, 4]), copy.deepcopy(state)
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_wrong_keys_and_shapes_are_named() -> None:
    good = tokenizer_state_dict(small())
    key = "decoder.mid.block_1.conv1.weight"
    with pytest.raises(ConfigError, match=rf"{key}' is missing \(expected \[32, 32, 3, 3\]\)"):
        load_tokenizer({k: v for k, v in good.items() if k != key}, [1, 2, 4])
    with pytest.raises(ConfigError, match=r"'loss.weight' \[2\] is not expected"):
        load_tokenizer(good | {"loss.weight": torch.zeros(2)}, [1, 2, 4])
    with pytest.raises(
        ConfigError, match=rf"'{key}' is \[32, 32, 1, 1\], expected \[32, 32, 3, 3\]"
    ):
        load_tokenizer(good | {key: torch.zeros(32, 32, 1, 1)}, [1, 2, 4])
    with pytest.raises(ConfigError, match=r"ema_vocab_hit_SV' is \[3, 12\].*expected \[10, 12\]"):
        load_tokenizer(good)
    with pytest.raises(ConfigError, match=r"quant_conv\.weight' is missing"):
        load_tokenizer({k: v for k, v in good.items() if k != "quant_conv.weight"}, [1, 2, 4])
    with pytest.raises(ConfigError, match="expected"):
        load_tokenizer(tokenizer_state_dict(small(num_phis=None)), [1, 2, 4][:2])
    with pytest.raises(ConfigError, match=r"qresi_ls\.2\.weight' is missing"):
        load_tokenizer({k: v for k, v in good.items() if "qresi_ls.2" not in k}, [1, 2, 4])


@pytest.mark.parametrize(
    "key",
    [
        "encoder.conv_in.weight",
        "quantize.embedding.weight",
        "quant_conv.weight",
        "encoder.conv_out.weight",
    ],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 0, 0, 0)])
def test_tensors_of_any_shape_are_errors_that_name_them(key: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ConfigError, match=key.replace(".", r"\.") + "|must|multiple|greater|quant_conv_kernel"
    ):
        load_tokenizer(tokenizer_state_dict(small()) | {key: torch.zeros(shape)}, [1, 2, 4])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(32, dtype=torch.int64), "torch.int64"),
        (torch.zeros(32).half(), "torch.float16"),
        (torch.zeros(32, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(32).to_sparse(), "expected a plain tensor"),
        (torch.zeros(32, device="meta"), "expected a plain tensor"),
        (torch.full((32,), torch.nan), "NaN"),
        (None, "NoneType"),
        ("text", "str"),
    ],
    ids=str,
)
def test_values_that_are_no_weights_are_named(value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"encoder\.norm_out\.weight' .*{says}"):
        load_tokenizer(
            tokenizer_state_dict(small()) | {"encoder.norm_out.weight": value}, [1, 2, 4]
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_resi": None},
        {"quant_resi": "0.5"},
        {"beta": -1},
        {"beta": None},
        {"using_znorm": "yes"},
        {"patch_nums": (0, 2, 4)},
        {"patch_nums": ()},
    ],
)
def test_settings_of_the_loader_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(SmaltoError):
        load_tokenizer(tokenizer_state_dict(small()), **{"patch_nums": [1, 2, 4]} | settings)


def test_scales_may_be_numpys() -> None:
    state = tokenizer_state_dict(small())
    assert load_tokenizer(state, list(numpy.array([1, 2, 4]))).quantize.scales == (
        (1, 1),
        (2, 2),
        (4, 4),
    )


def test_a_level_without_weights_is_named() -> None:
    state = {
        key: value
        for key, value in tokenizer_state_dict(small({"ch_mult": (1, 1, 1)})).items()
        if "encoder.down.1." not in key
    }
    with pytest.raises(ConfigError, match=r"encoder\.down\.1\.block\.0\.conv1\.weight' is missing"):
        load_tokenizer(state, [1, 2, 4])


def test_nested_checkpoints(tmp_path: Path) -> None:
    tokenizer = small()
    good, images = tokenizer_state_dict(tokenizer), torch.rand(1, 3, 8, 8)
    expected = tokenizer.encode(images)
    for nested in (
        {"state_dict": good},
        {
            "epoch": 3,
            "trainer": {"vae_local": good, "var_wo_ddp": {"pos_1LC": torch.zeros(2)}},
            "args": {"lr": 1e-4},
        },
        {f"module.{key}": tensor for key, tensor in good.items()},
        {
            "model": {f"vae.{key}": tensor for key, tensor in good.items()}
            | {"optimizer_step": torch.zeros(1)}
        },
    ):
        torch.save(nested, tmp_path / "nested.pth")
        assert torch.equal(
            load_tokenizer(tmp_path / "nested.pth", [1, 2, 4]).encode(images), expected
        )
    safetensors.torch.save_file(good, tmp_path / "vae.safetensors")
    assert torch.equal(
        load_tokenizer(str(tmp_path / "vae.safetensors"), [1, 2, 4]).encode(images), expected
    )
    with pytest.raises(DataError, match=r"2 sets of weights.*\['model'\]; \['ema'\]"):
        load_tokenizer({"model": good, "ema": good}, [1, 2, 4])
    with pytest.raises(DataError, match=r"the top level; keys that begin with 'ema\.'"):
        load_tokenizer(good | {f"ema.{key}": tensor for key, tensor in good.items()}, [1, 2, 4])


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "none.pth")
    with pytest.raises(DataError, match="is a folder"):
        load_tokenizer(tmp_path)
    torch.save({"pos_1LC": torch.zeros(2), "lvl_1L": torch.zeros(2)}, tmp_path / "var.pth")
    with pytest.raises(DataError, match="transformer"):
        load_tokenizer(tmp_path / "var.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(
        DataError, match=r"with weight, .*expected the weights of a tokenizer of VAR"
    ):
        load_tokenizer(tmp_path / "other.pth")
    torch.save({"args": Path("x")}, tmp_path / "objects.pth")
    with pytest.raises(
        DataError, match=r"holds a pathlib\.PosixPath beside its tensors, and smalto runs no code"
    ):
        load_tokenizer(tmp_path / "objects.pth")
    for name, content in (
        ("text.pth", b"hello"),
        ("empty.pth", b""),
        ("cut.pth", (tmp_path / "other.pth").read_bytes()[:300]),
        ("dot.pth", b"."),
        ("80.pth", b"\x80"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError):
            load_tokenizer(tmp_path / name)
    (tmp_path / "x.safetensors").write_bytes(b"hello")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (small(scales=(1, 2, (4, 6))), "square"),
        (small(scale={"code_dim": 2}), "projections"),
        (small(scales=(4,)), "one scale"),
        (smalto.default_tokenizer(), "multiscale"),
        (smalto.SimpleVQVAE(), "multiscale"),
    ],
)
def test_what_var_cannot_hold(tokenizer: ImageTokenizer, reason: str) -> None:
    assert reason in obstacles(tokenizer)[0]
    with pytest.raises(ConfigError, match=f"VAR cannot hold this tokenizer: .*{reason}"):
        tokenizer_state_dict(tokenizer)


def test_what_var_must_be_given() -> None:
    tokenizer = small(
        {"ch_mult": (1, 2), "attention": False}, scale={"metric": "cosine"}, num_phis=None
    )
    arguments, fixed = constructor_values(tokenizer)
    assert arguments == {
        "vocab_size": 12, "z_channels": 4, "ch": 32, "using_znorm": True, "share_quant_resi": 0,
        "v_patch_nums": (1, 2, 4)
    }  # fmt: skip
    assert fixed == {
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "using_sa": False,
        "using_mid_sa": False,
    }


@pytest.mark.parametrize("ratio", [1e-9, 1e-6])
def test_a_phi_that_var_does_not_build_is_refused(ratio: float) -> None:
    tokenizer = small(phi_ratio=ratio)
    assert f"phi_ratio {ratio:g}; expected 0 or a value above 1e-06" in obstacles(tokenizer)[0]
    with pytest.raises(ConfigError, match=r"VAR cannot hold this tokenizer: .*Identity"):
        tokenizer_state_dict(tokenizer)
    assert obstacles(small(phi_ratio=1.1e-6)) == []


@pytest.mark.parametrize("quant_resi", [0, 1e-9, -1e-6, 1e-6])
def test_a_tiny_quant_resi_is_the_identity(quant_resi: float) -> None:
    tokenizer = small(phi_ratio=0.0)
    state = tokenizer_state_dict(tokenizer)
    assert not any("quant_resi" in key for key in state)
    back = load_tokenizer(state, [1, 2, 4], quant_resi=quant_resi)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(back.encode(images), tokenizer.encode(images))
    with pytest.raises(ConfigError, match=r"quant_resi\.qresi_ls\.0\.weight' .*is not expected"):
        load_tokenizer(tokenizer_state_dict(small()), [1, 2, 4], quant_resi=quant_resi)


def test_a_quant_resi_of_nan_is_refused() -> None:
    with pytest.raises(ConfigError, match="phi_ratio"):
        load_tokenizer(tokenizer_state_dict(small()), [1, 2, 4], quant_resi=float("nan"))


def test_settings_of_vars_code() -> None:
    settings = var_settings(small({"ch_mult": (1, 2)}, scale={"beta": 0.1}, num_phis=None))
    assert settings == VARSettings(
        vocab_size=12,
        z_channels=4,
        ch=32,
        share_quant_resi=0,
        patch_nums=(1, 2, 4),
        patch_size=2,
        vqvae={"beta": 0.1},
        ddconfig={"ch_mult": (1, 2), "num_res_blocks": 1},
    )


def test_loading_in_a_process_that_built_var(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small()
    state = tokenizer_state_dict(tokenizer)
    for layer in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    loaded = load_tokenizer(state, [1, 2, 4])
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    with pytest.raises(RunError, match="uninitialized weights"):
        small()
