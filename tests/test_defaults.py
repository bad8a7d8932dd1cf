"""The API's tests once more, under other defaults of PyTorch."""

from __future__ import annotations

from pathlib import Path

import fresh_python
import pytest
import torch

from pdl_ext import PDLLoss, TokenFrequency

TESTS = Path(__file__).parent
MODULES = (
    *("test_loss", "test_functional", "test_weighting", "test_identities", "test_reference", "test_statistics"),
    *("test_module_life", "test_loss_and_gradient", "test_linear", "test_frequency", "corpus/test_counting"),
)
# The kernels' sizes and alignments do not depend on defaults, and a tracer does not support setting them.
LEFT_OUT = "emulated or compile or tracers or sizes or memory or gradcheck or flipped"


# One that is wider than float32, and one that is narrower.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_defaults_are_not_heeded(dtype, tmp_path):
    done = fresh_python.run(
        *("-m", "pytest", "-q", "-x", "-p", "other_defaults", "-p", "no:cacheprovider"),
        *("--default-dtype", dtype, "-k", f"not ({LEFT_OUT})"),
        *(TESTS / f"{name}.py" for name in MODULES),
        cwd=tmp_path,
        env={"PYTHONPATH": str(TESTS)},
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("make", [lambda: TokenFrequency(7), lambda: PDLLoss(vocab_size=7)], ids=["frequency", "loss"])
def test_what_is_made_is_where_the_default_device_is(make):
    """Like other modules; but counts on meta would have no values."""
    with torch.device("meta"):
        assert {buffer.device.type for buffer in make().buffers()} == {"cpu"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        assert {buffer.device.type for buffer in make().buffers()} == {device}
