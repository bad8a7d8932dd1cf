"""Every input that the loss refuses: the error names the argument, the value received and the value expected."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from pdl_ext import PDLLoss, PowerLaw, TokenFrequency, functional
from pdl_ext.engine import ops
from pdl_ext.options import LossOptions

LOGITS = torch.zeros(2, 3, 5)
TARGETS = torch.tensor([[0, 1, 2], [3, 4, -100]])

INPUTS = [
    ({"logits": [[0.0]]}, TypeError, "logits: got list, expected a tensor"),
    ({"targets": [1]}, TypeError, "targets: got list, expected a tensor"),
    ({"logits": LOGITS.int()}, TypeError, "logits: got dtype torch.int32, expected one of float32, bfloat16, float16"),
    ({"targets": TARGETS.float()}, TypeError, "targets: got dtype torch.float32, expected one of int64, int32"),
    ({"targets": TARGETS.to(torch.uint8)}, TypeError, "targets: got dtype torch.uint8, expected one of int64, int32"),
    ({"logits": torch.zeros(())}, ValueError, r"logits: got shape \[\], expected \[..., V\] with V >= 1"),
    ({"logits": LOGITS[..., :0]}, ValueError, r"logits: got shape \[2, 3, 0\], expected \[..., V\] with V >= 1"),
    ({"targets": TARGETS[0]}, ValueError, r"targets: got shape \[3\], expected \[2, 3\]: that of logits \[2, 3, 5\]"),
    ({"targets": TARGETS.view(-1)}, ValueError, r"targets: got shape \[6\], expected \[2, 3\]"),
    ({"targets": TARGETS.to("meta")}, ValueError, "targets: got device meta, expected cpu, where the logits are"),
    ({"row_weight": 1.0}, TypeError, "row_weight: got float, expected a tensor or None"),
    ({"row_weight": TARGETS}, TypeError, "row_weight: got dtype torch.int64, expected a floating one"),
    ({"row_weight": torch.ones(3)}, ValueError, r"row_weight: got shape \[3\], expected that of targets, \[2, 3\]"),
    ({"row_weight": torch.ones(2, 3, device="meta")}, ValueError, "row_weight: got device meta, expected cpu"),
    ({"normalizer": -2.0}, ValueError, "normalizer: got -2.0, expected a finite number >= 0"),
    ({"normalizer": math.nan}, ValueError, "normalizer: got nan, expected a finite number >= 0"),
    ({"normalizer": math.inf}, ValueError, "normalizer: got inf, expected a finite number >= 0"),
    ({"normalizer": "rows"}, TypeError, "normalizer: got 'rows' of type str, expected a finite number >= 0 or a 0-d"),
    ({"normalizer": True}, TypeError, "normalizer: got True of type bool, expected a finite number >= 0 or a 0-d"),
    ({"normalizer": torch.ones(2)}, ValueError, r"normalizer: got shape \[2\] on cpu, expected a 0-d tensor on cpu"),
    ({"normalizer": torch.ones((), device="meta")}, ValueError, r"normalizer: got shape \[\] on meta, expected a 0-d"),
    (
        {"normalizer": torch.ones((), requires_grad=True)},
        ValueError,
        r"normalizer: got shape \[\] on cpu, requiring grad, expected .* that does not require grad",
    ),
]

TABLES = [
    (1.0, TypeError, "got float, expected a tensor or None"),
    (
        torch.ones(5, dtype=torch.float64),
        TypeError,
        "got dtype torch.float64, expected float32 whatever the logits' dtype",
    ),
    (torch.ones(4), ValueError, r"got shape \[4\], expected \[5\], the logits' vocabulary"),
    (torch.ones(1, 5), ValueError, r"got shape \[1, 5\], expected \[5\], the logits' vocabulary"),
    (torch.ones(5, device="meta"), ValueError, "got device meta, expected cpu, where the logits are"),
    (torch.ones(5, requires_grad=True), ValueError, "got a tensor that requires grad, expected one that does not"),
]

OPTIONS = [
    ({"reduction": "avg"}, r"reduction: got 'avg', expected one of \['mean', 'none', 'sum', 'token_mean'\]"),
    ({"ignore_index": 0.5}, "ignore_index: got 0.5, expected an int"),
    ({"ignore_index": 2**31}, "ignore_index: got 2147483648, expected an int"),
    ({"ignore_index": True}, "ignore_index: got True, expected an int"),
    ({"label_smoothing": -0.1}, r"label_smoothing: got -0.1, expected a number from 0 to 1"),
    ({"label_smoothing": 1.1}, r"label_smoothing: got 1.1, expected a number from 0 to 1"),
    ({"label_smoothing": math.nan}, r"label_smoothing: got nan, expected a number from 0 to 1"),
    ({"z_loss": -1e-4}, "z_loss: got -0.0001, expected a finite number >= 0"),
    ({"z_loss": math.inf}, "z_loss: got inf, expected a finite number >= 0"),
    ({"softcap": 0.0}, "softcap: got 0.0, expected None or a finite number > 0"),
    ({"softcap": -30.0}, "softcap: got -30.0, expected None or a finite number > 0"),
    ({"softcap": math.nan}, "softcap: got nan, expected None or a finite number > 0"),
    ({"logit_scale": 0.0}, "logit_scale: got 0.0, expected a finite number other than 0"),
    ({"logit_scale": math.inf}, "logit_scale: got inf, expected a finite number other than 0"),
    ({"logit_scale": math.nan}, "logit_scale: got nan, expected a finite number other than 0"),
]


@pytest.mark.parametrize(
    "function", [functional.pdl_loss, PDLLoss(torch.ones(5, dtype=torch.int64))], ids=["function", "module"]
)
@pytest.mark.parametrize(("bad", "error", "message"), INPUTS, ids=[message[:44] for _, _, message in INPUTS])
def test_bad_inputs(function, bad, error, message):
    with pytest.raises(error, match=message):
        function(**{"logits": LOGITS, "targets": TARGETS, **bad})


@pytest.mark.parametrize("name", ["token_weight", "logit_offset"])
@pytest.mark.parametrize(("table", "error", "message"), TABLES, ids=[message[:34] for _, _, message in TABLES])
def test_bad_tables(name, table, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        functional.pdl_loss(LOGITS, TARGETS, **{name: table})


@pytest.mark.parametrize(("bad", "message"), OPTIONS, ids=str)
def test_bad_options(bad, message):
    with pytest.raises(ValueError, match=message):
        functional.pdl_loss(LOGITS, TARGETS, **bad)
    with pytest.raises(ValueError, match=message):
        PDLLoss(**bad)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_normalizer_without_a_mean(reduction):
    with pytest.raises(ValueError, match=f"normalizer: got one with reduction='{reduction}', expected reduction"):
        functional.pdl_loss(LOGITS, TARGETS, reduction=reduction, normalizer=2.0)


def test_shift_without_a_sequence():
    with pytest.raises(ValueError, match=r"shift: got True with targets of shape \[\], expected a sequence dimension"):
        functional.pdl_loss(torch.zeros(5), torch.tensor(1), shift=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha: got -1.0, expected a number from"),
        ({"epsilon": -1.0}, ValueError, "epsilon: got -1.0, expected 0 or a number from"),
        ({"weighting": 0.5}, TypeError, "weighting: got float, expected a Weighting"),
        ({"weighting": PowerLaw(), "alpha": 0.5}, ValueError, "weighting: got one together with alpha or epsilon"),
        ({"frequency": 7}, TypeError, "frequency: got int, expected TokenFrequency, int64 counts, a path or None"),
        ({"frequency": torch.ones(3)}, TypeError, r"counts: got dtype torch.float32, expected int64"),
        (
            {"frequency": "no/such/file"},
            FileNotFoundError,
            "path: no file at no/such/file, expected one that `pdl-ext count` or `save` wrote",
        ),
        (
            {"frequency": TokenFrequency(4), "vocab_size": 5},
            ValueError,
            "vocab_size: got 5, expected 4, the frequency's",
        ),
        ({"vocab_size": 0}, ValueError, "vocab_size: got 0, expected an int from"),
        ({"frequency": TokenFrequency(4), "weighting": PowerLaw(fixed={4: 1.0})}, ValueError, "fixed: got token id 4"),
    ],
    ids=str,
)
def test_bad_modules(arguments, error, message):
    with pytest.raises(error, match=message):
        PDLLoss(**arguments)


@pytest.mark.parametrize("frequency", [None, torch.ones(4, dtype=torch.int64)], ids=["online", "given"])
def test_logits_of_another_vocabulary(frequency):
    loss_fn = PDLLoss(frequency, vocab_size=4)
    with pytest.raises(ValueError, match="logits: got a vocabulary of 5, expected 4, the frequency's"):
        loss_fn(LOGITS, TARGETS)


def test_logits_on_another_device():
    with pytest.raises(
        ValueError, match=r"logits: got device meta, expected cpu, where the frequency is: move the loss with \.to"
    ):
        PDLLoss(vocab_size=5)(LOGITS.to("meta"), TARGETS.to("meta"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("bad", [5, -1, -101, 2**31 - 1])
def test_target_out_of_range_names_position_and_value(bad, dtype):
    targets = TARGETS.to(dtype)
    targets[1, 1] = bad
    logits = LOGITS.clone().requires_grad_()
    expected = rf"targets: got {bad} at position \[1, 1\], expected 0 <= id < 5 or ignore_index \(-100\)"
    for function in (functional.pdl_loss, PDLLoss(vocab_size=5), PDLLoss(vocab_size=5).eval()):
        with pytest.raises(IndexError, match=expected):
            function(logits, targets)
    assert logits.grad is None


@pytest.mark.parametrize("bad", [2**31, 2**32 + 1, -(2**40)])
def test_target_past_32_bits(bad):
    with pytest.raises(IndexError, match=rf"targets: got {bad} at position \[0\]"):
        functional.pdl_loss(torch.zeros(1, 5), torch.tensor([bad]))


def test_position_of_a_shifted_target_is_the_callers():
    targets = torch.tensor([[9, 1, 2], [9, 3, 7]])  # the first of a sequence is no target of a shifted loss
    logits = torch.zeros(2, 3, 5)
    for function in (PDLLoss(vocab_size=5, shift=True), PDLLoss(torch.ones(5).long(), shift=True)):
        with pytest.raises(IndexError, match=r"targets: got 7 at position \[1, 2\]"):
            function(logits, targets)


@pytest.mark.slow
def test_target_out_of_range_under_compile():
    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    targets = torch.tensor([1, 7])
    with pytest.raises(IndexError, match="targets: got 7 at flattened position 1, expected 0 <= id < 5"):
        compiled(functional.pdl_loss)(torch.zeros(2, 5, requires_grad=True), targets)
    loss_fn = PDLLoss(vocab_size=5)
    with pytest.raises(IndexError, match="got 7 at flattened position 1, expected 0 <= id < 5"):
        compiled(loss_fn)(torch.zeros(2, 5, requires_grad=True), targets)
    assert not loss_fn.frequency.counts.any()


PACKED = LossOptions().packed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda ops, x, y: ops.loss_forward(x[0], y, None, None, None, None, PACKED, False),
            r"logits must have shape \[N, V\]",
        ),
        (
            lambda ops, x, y: ops.loss_forward(x.t(), y, None, None, None, None, PACKED, False),
            "last dimension of stride 1",
        ),
        (
            lambda ops, x, y: ops.loss_forward(x, y[:1], None, None, None, None, PACKED, False),
            "targets must be one a row",
        ),
        (
            lambda ops, x, y: ops.loss_forward(x, y.repeat(2)[::2], None, None, None, None, PACKED, False),
            "targets must be contiguous",
        ),
        (
            lambda ops, x, y: ops.loss_forward(x, y, x[0, :2], None, None, None, PACKED, False),
            "token_weight must be contig",
        ),
        (
            lambda ops, x, y: ops.loss_forward(x, y, None, y, None, None, PACKED, False),
            "row_weight has the wrong dtype",
        ),
        (
            lambda ops, x, y: ops.loss_forward(x, y, None, None, None, torch.empty(0), PACKED, False),
            "normalizer must be contiguous with shape",
        ),
        (
            lambda ops, x, y: ops.loss_forward(x, y, None, None, None, torch.ones(2).double(), PACKED, False),
            "normalizer has the wrong dtype",
        ),
        (
            lambda ops, x, y: ops.loss_forward(x.int(), y, None, None, None, None, PACKED, False),
            "logits must be float32",
        ),
        (
            lambda ops, x, y: ops.loss_backward(x[0, 0], x, y, x, x[0], None, None, None, PACKED, 0, 3),
            "saved_rows must be what loss_forward",
        ),
        (
            lambda ops, x, y: ops.loss_backward(
                x[0, 0], x, y, torch.zeros(9, 2), torch.zeros(5), None, None, None, PACKED, 1, 3
            ),
            "the logits must be a shard of the vocabulary",
        ),
        (
            lambda ops, x, y: ops.loss_backward(
                x[0, 0], x, y, torch.zeros(9, 2), torch.zeros(5), None, None, None, PACKED, 0, -(2**63)
            ),
            "the logits must be a shard of the vocabulary",
        ),
        (
            lambda ops, x, y: ops.loss_backward_(
                x[0, 0], x[:1].expand(2, 3), y, torch.zeros(9, 2), torch.zeros(5), None, None, None, PACKED, 0, 3
            ),
            "logits must have shape .* rows that do not overlap",
        ),
        (
            lambda ops, x, y: ops.reduce_rows(torch.zeros(8, 3), y, None, None, PACKED),
            "saved_rows must be what loss_forward",
        ),
        (
            lambda ops, x, y: ops.reduce_rows(torch.zeros(8, 2), y.bool(), None, None, PACKED),
            "targets must be int64 or int32",
        ),
        (
            lambda ops, x, y: ops.token_weights(x[0], None, None, 1.0, 0.0, 1.0, True, 1, 1.0),
            "counts must be contiguous int64",
        ),
        (
            lambda ops, x, y: ops.count_tokens_(y, y[:1], y, y[:1], y, 0, False),
            "ignored, out_of_range and seen must be int64",
        ),
        (
            lambda ops, x, y: ops.count_tokens_(y, y[:1], y[1:], y[1:], x, 0, False),
            "tokens must be uint8, uint16, int32, uint32 or int64",
        ),
    ],
)
def test_ops_called_directly_keep_memory_safe(device, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(ops.compiled, torch.zeros(2, 3, device=device), torch.tensor([0, 1], device=device))


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": "0.1"},
        {"label_smoothing": True},
        {"z_loss": None},
        {"softcap": "a"},
        {"logit_scale": None},
        {"reduction": ["mean"]},
        {"shift": "no"},
    ],
    ids=str,
)
def test_option_of_a_wrong_type_is_named(options):
    (name,) = options
    for call in (lambda: functional.pdl_loss(LOGITS, TARGETS, **options), lambda: PDLLoss(**options)):
        with pytest.raises((TypeError, ValueError), match=f"{name}: got "):
            call()


@pytest.mark.parametrize("ignore_index", [2**70, "a", None, True])
def test_ignore_index_of_a_wrong_type_is_named(ignore_index):
    with pytest.raises(ValueError, match="ignore_index: got "):
        functional.count_tokens(TARGETS, 5, ignore_index=ignore_index)
    with pytest.raises(ValueError, match="ignore_index: got "):
        TokenFrequency(5, ignore_index=ignore_index)


def test_forward_mode_is_refused_not_zero():
    logits = torch.randn(2, 5)
    tangent = torch.randn(2, 5)
    with pytest.raises(RuntimeError, match=r"the kernels do not support torch\.func"):
        torch.func.jvp(lambda x: functional.pdl_loss(x, torch.tensor([1, 2])), (logits,), (tangent,))


def test_vocabulary_past_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"logits: got shape \[1, 1073741825\], expected .* at most 2\^30"):
        functional.pdl_loss(torch.zeros(1, 1).expand(1, 2**30 + 1), torch.tensor([0]))
