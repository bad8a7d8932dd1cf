"""Options together: a sample of their product against the reference, and the pairs that are refused."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from pdl_ext import PDLLoss, functional, reference
from pdl_ext.engine import linear
from pdl_ext.modulation import DFT, EAFT, AntiFocal, Focal, MiLe
from pdl_ext.options import REDUCTIONS
from pdl_ext.weighting import PowerLaw, Uniform

VOCAB = 23
PRODUCT = {
    "modulation": (
        {},
        {"modulation": Focal(0.5)},
        {"modulation": Focal(1.0)},
        {"modulation": Focal(3.0, detach=True)},
        {"modulation": AntiFocal(2.0, 0.5)},
        {"modulation": DFT()},
        {"modulation": MiLe()},
        {"modulation": MiLe(0.5, normalize=False)},
        {"modulation": EAFT(1.5)},
    ),
    "reduction": tuple({"reduction": reduction} for reduction in REDUCTIONS),
    "smoothing": (
        {},
        {"label_smoothing": 0.2},
        {"label_smoothing": 0.2, "label_smoothing_weight": "none"},
        {"label_smoothing": 0.2, "label_smoothing_weight": "class"},
    ),
    "z_loss": ({}, {"z_loss": 0.01}),
    "softcap": ({}, {"softcap": 5.0}),
    "logit_scale": ({}, {"logit_scale": 0.7}),
    "logit_offset": ({}, {"logit_offset": True}),
    "token_weight": ({}, {"token_weight": True}),
    "row_weight": ({}, {"row_weight": True}),
    "normalizer": ({}, {"normalizer": 2.5}),
    "shift": ({}, {"shift": True}),
    "way": ({"way": "two calls"}, {"way": "in place"}, {"way": "linear"}),
    "dtype": tuple({"dtype": dtype} for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
}
# Relative to the norm of the float64 reference for the same inputs.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SAMPLE = 4000
OF_NO_MEAN = [place for place, reduction in enumerate(REDUCTIONS) if reduction in ("none", "sum")]


def sample(number, seed=0):
    """Positions in PRODUCT, one of each option; a normalizer is only for means."""
    draw = random.Random(seed)
    drawn = []
    for _ in range(number):
        places = {option: draw.choice(range(len(values))) for option, values in PRODUCT.items()}
        if places["reduction"] in OF_NO_MEAN:
            places["normalizer"] = 0
        drawn.append(tuple(places.values()))
    return drawn


def options_at(places):
    options = {}
    for values, place in zip(PRODUCT.values(), places, strict=True):
        options |= values[place]
    return options


def over_logits(logits, *arguments, **options):
    return functional.pdl_loss(logits * 1, *arguments, inplace_backward=True, **options)


def over_slabs(logits, *arguments, **options):
    classifier = torch.eye(VOCAB, dtype=logits.dtype, device=logits.device)
    # Slabs of four rows.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_LEAST_ROWS", 4)
        return functional.linear_pdl_loss(logits, classifier, *arguments, max_chunk_bytes=1, **options)


WAYS = {"two calls": functional.pdl_loss, "in place": over_logits, "linear": over_slabs}


def run(function, device, dtype, wide, options):
    """Loss, gradients of logits and row weights, and statistics, of inputs in `dtype` as `wide` numbers."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(3, 4, VOCAB, generator=generator)
    targets = torch.randint(VOCAB, (3, 4), generator=generator)
    logits[1, 2, targets[1, 2]] += 9
    targets[0, 1] = -100
    leaf = logits.to(dtype).to(device, wide).requires_grad_()
    given = dict(options)
    token_weight = 0.2 + torch.rand(VOCAB, generator=generator)
    token_weight = token_weight.to(device) if given.pop("token_weight", False) else None
    row_weight = (0.3 + torch.rand((3, 4), generator=generator)).to(dtype)
    row_weight = row_weight.to(device, wide).requires_grad_() if given.pop("row_weight", False) else None
    if "logit_offset" in given:
        given["logit_offset"] = torch.randn(VOCAB, generator=generator).to(device)
    targets = targets.to(device)
    loss, stats = function(leaf, targets, token_weight, row_weight=row_weight, return_stats=True, **given)
    loss.backward((0.1 + torch.rand(loss.shape, generator=generator)).to(loss))
    of_row_weight = [] if row_weight is None else [row_weight.grad]
    return [loss.detach(), leaf.grad, *of_row_weight, *stats]


def check(device, options):
    given = dict(options)
    way, dtype = given.pop("way"), given.pop("dtype")
    expected = run(reference.pdl_loss, device, dtype, torch.float64, given)
    for got, value in zip(run(WAYS[way], device, dtype, dtype, given), expected, strict=True):
        error = torch.linalg.vector_norm(got.double() - value.double())
        assert error <= TOLERANCE[dtype] * torch.linalg.vector_norm(value.double()), f"{options}: {got} {value}"


def test_any_three_values_meet():
    met = set()
    for places in sample(SAMPLE):
        met |= set(itertools.combinations(zip(PRODUCT, places, strict=True), 3))
    values = [[(option, place) for place in range(len(of_option))] for option, of_option in PRODUCT.items()]
    possible = set()
    for three in itertools.combinations(values, 3):
        possible |= set(itertools.product(*three))
    refused = {(("reduction", place), ("normalizer", 1)) for place in OF_NO_MEAN}
    assert met == {three for three in possible if not refused & set(itertools.combinations(three, 2))}


@pytest.mark.slow
@pytest.mark.devices("cpu")
@pytest.mark.parametrize("part", range(8))
def test_combinations_match_reference(device, part):
    for places in sample(SAMPLE)[part::8]:
        check(device, options_at(places))


@pytest.mark.slow
@pytest.mark.devices("emulated", "cuda")
def test_some_combinations_match_reference(device):
    for places in sample(150, seed=1):
        check(device, options_at(places))


# Refused pairs of options: their names, and a call with them. docs/family.md has the table.

LOGITS, TARGETS = torch.zeros(2, 3), torch.tensor([0, 2])
COUNTS = torch.tensor([5, 2, 1])


def by_class_with_weight_drop():
    PDLLoss(COUNTS, label_smoothing=0.1, label_smoothing_weight="class", weight_drop=0.5)


def normalizer_of_a_sum():
    functional.pdl_loss(LOGITS, TARGETS, reduction="sum", normalizer=2.0)


def exponent_of_another_weighting():
    PDLLoss(weighting=PowerLaw(), alpha=0.5)


def sync_of_a_given_frequency():
    PDLLoss(COUNTS, sync_every=2)


def sync_without_counts():
    PDLLoss(weighting=Uniform(), sync_every=2)


def gradient_with_a_graph(loss_of):
    leaf = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(leaf), leaf, create_graph=True)
    gradient.sum().backward()


def second_derivative_of_linear():
    gradient_with_a_graph(lambda leaf: functional.linear_pdl_loss(leaf, torch.eye(3), TARGETS))


def second_derivative_in_place():
    gradient_with_a_graph(lambda leaf: functional.pdl_loss(leaf * 1, TARGETS, inplace_backward=True))


def second_derivative_of_a_shard():
    gradient_with_a_graph(lambda leaf: functional.pdl_loss(leaf, TARGETS, process_group=dist.group.WORLD))


def tangent_of_linear():
    with forward_ad.dual_level():
        functional.linear_pdl_loss(forward_ad.make_dual(LOGITS, LOGITS), torch.eye(3), TARGETS)


def tangent_of_a_shard():
    with forward_ad.dual_level():
        functional.pdl_loss(forward_ad.make_dual(LOGITS, LOGITS), TARGETS, process_group=dist.group.WORLD)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")


def tangent_under_compile():
    with forward_ad.dual_level():
        compiled(functional.pdl_loss)(forward_ad.make_dual(LOGITS, LOGITS), TARGETS)


def second_derivative_under_compile():
    gradient_with_a_graph(lambda leaf: compiled(functional.pdl_loss)(leaf, TARGETS))


def transform_of_the_fused_loss():
    torch.func.grad(functional.pdl_loss)(LOGITS, TARGETS)


SECOND, FORWARD = "has no second derivative", "has no forward-mode derivative"
REFUSED = [
    ('`label_smoothing_weight="class"`', "`weight_drop` above 0", "weight_drop: got", by_class_with_weight_drop),
    ("`normalizer`", '`reduction` "sum" or "none"', "normalizer: got", normalizer_of_a_sum),
    ("`weighting`", "`alpha` or `epsilon`", "weighting: got", exponent_of_another_weighting),
    ("`sync_every`", "a given frequency", "sync_every: got", sync_of_a_given_frequency),
    ("`sync_every`", "a weighting that counts nothing", "sync_every: got", sync_without_counts),
    ("second derivatives", "`linear`", SECOND, second_derivative_of_linear),
    ("second derivatives", "`inplace_backward`", SECOND, second_derivative_in_place),
    ("second derivatives", "`process_group`", SECOND, second_derivative_of_a_shard),
    ("forward mode", "`linear`", FORWARD, tangent_of_linear),
    ("forward mode", "`process_group`", FORWARD, tangent_of_a_shard),
    ("forward mode", "`torch.compile`", FORWARD, tangent_under_compile),
    ("second derivatives", "`torch.compile`", "double backward", second_derivative_under_compile),
    ("transforms of `torch.func`", "every fused loss", r"torch\.func", transform_of_the_fused_loss),
]


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def error_of(message):
    """An error that names an argument is a ValueError."""
    return ValueError if message.endswith(": got") else RuntimeError


@pytest.mark.parametrize(("message", "call"), [row[2:] for row in REFUSED], ids=[f"{a}-{b}" for a, b, *_ in REFUSED])
def test_pairs_that_are_refused(group_of_one, message, call):
    with pytest.raises(error_of(message), match=message):
        call()


def test_the_table_of_refused_pairs_is_this_list():
    table = ["| this | with this | error |", "|---|---|---|"]
    table += [f"| {first} | {second} | {error_of(message).__name__} |" for first, second, message, _ in REFUSED]
    text = (Path(__file__).parent.parent / "docs" / "family.md").read_text(encoding="utf-8")
    assert "\n".join(table) in text
