"""Devices are resolved, and running out of memory names what to try."""

import pytest
import torch

from smalto.core.device import computing, resolve_device
from smalto.core.errors import ConfigError, SmaltoError


def test_auto_takes_what_is_there() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="'cuda', which is not available; expected one of cpu"):
        resolve_device("cuda")


def test_out_of_memory_names_the_batch_to_try() -> None:
    cpu = torch.device("cpu")
    with (
        pytest.raises(SmaltoError, match=r"batch of 16\. Try --batch 8"),
        computing(cpu, "float32", 16),
    ):
        torch.empty(2**50)
    with pytest.raises(SmaltoError, match="Try smaller images"), computing(cpu, "float32", 1):
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="something else"), computing(cpu, "float32", 1):
        raise RuntimeError("something else")


def test_bf16_is_autocast() -> None:
    layer = torch.nn.Linear(4, 4)
    with computing(torch.device("cpu"), "bf16", 1):
        assert layer(torch.zeros(1, 4)).dtype == torch.bfloat16
    with computing(torch.device("cpu"), "float32", 1):
        assert layer(torch.zeros(1, 4)).dtype == torch.float32
