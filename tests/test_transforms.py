"""torch.func's transforms: each gives the right result or an error that says what to do, never a gradient of None."""

from __future__ import annotations

import pytest
import torch
from torch import func

from pdl_ext import PDLLoss, PowerLaw, TokenFrequency, functional, reference

VOCAB = 11
REFUSED = r"pdl_ext: the (kernels do not support torch\.func|fused loss has no (forward-mode|second) derivative)"


def of_logits(function):
    logits = torch.randn(3, 4, VOCAB, generator=torch.Generator().manual_seed(0))
    return logits, function


def of_hidden(function):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 5), (VOCAB, 5)))

    def loss(scores, targets, **options):
        return function(scores, weight, targets, **options)

    return hidden, loss


# What a loss takes, and the loss, from which `scores` is the tensor with a batch dimension in front.
LOSSES = {
    "loss": of_logits(functional.pdl_loss),
    "module": of_logits(PDLLoss(torch.arange(VOCAB))),
    "online module": of_logits(PDLLoss(vocab_size=VOCAB)),
    "linear": of_hidden(functional.linear_pdl_loss),
    "linear of a module": of_hidden(PDLLoss(torch.arange(VOCAB)).linear),
}
TARGETS = torch.randint(VOCAB, (3, 4), generator=torch.Generator().manual_seed(1))


def one(loss):
    return lambda scores: loss(scores, TARGETS[0])


TRANSFORMS = {
    "vmap": lambda loss, scores: func.vmap(loss)(scores, TARGETS),
    "vmap over targets": lambda loss, scores: func.vmap(lambda t: loss(scores[0], t))(TARGETS),
    "vmap over row weights": lambda loss, scores: func.vmap(lambda r: loss(scores[0], TARGETS[0], row_weight=r))(
        torch.ones(3, 4)
    ),
    "vmap over normalizers": lambda loss, scores: func.vmap(lambda n: loss(scores[0], TARGETS[0], normalizer=n))(
        torch.ones(3)
    ),
    "grad": lambda loss, scores: func.grad(one(loss))(scores[0]),
    "grad_and_value": lambda loss, scores: func.grad_and_value(one(loss))(scores[0]),
    "vjp": lambda loss, scores: func.vjp(one(loss), scores[0]),
    "jvp": lambda loss, scores: func.jvp(one(loss), (scores[0],), (scores[0],)),
    "linearize": lambda loss, scores: func.linearize(one(loss), scores[0]),
    "jacrev": lambda loss, scores: func.jacrev(one(loss))(scores[0]),
    "jacfwd": lambda loss, scores: func.jacfwd(one(loss))(scores[0]),
    "hessian": lambda loss, scores: func.hessian(one(loss))(scores[0]),
    "vmap of grad": lambda loss, scores: func.vmap(func.grad(loss))(scores, TARGETS),
    "functionalize": lambda loss, scores: func.functionalize(one(loss))(scores[0]),
    "autograd's jvp": lambda loss, scores: torch.autograd.functional.jvp(one(loss), scores[0], scores[0]),
    "autograd's hvp": lambda loss, scores: torch.autograd.functional.hvp(one(loss), scores[0], scores[0]),
    "vectorized jacobian": lambda loss, scores: torch.autograd.functional.jacobian(
        one(loss), scores[0], vectorize=True, strategy="forward-mode"
    ),
}


# By second derivatives and tangents, which the loss of logits has.
OF_AUTOGRAD = {"autograd's jvp", "autograd's hvp", "vectorized jacobian"}


REFUSALS = [
    (transform, name) for transform in TRANSFORMS for name in LOSSES if transform not in OF_AUTOGRAD or "linear" in name
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("transform", "name"), REFUSALS)
@pytest.mark.devices("cpu", "cuda")
def test_transforms_are_refused(device, transform, name, requires_grad):
    scores, loss = LOSSES[name]
    with pytest.raises(RuntimeError, match=REFUSED):
        TRANSFORMS[transform](loss, scores.clone().requires_grad_(requires_grad))


@pytest.mark.parametrize("name", ["loss", "module"])
@pytest.mark.parametrize("transform", sorted(OF_AUTOGRAD))
def test_what_autograd_makes_of_the_definition(transform, name):
    scores, loss = LOSSES[name]
    weights = functional.token_weights(torch.arange(VOCAB), PowerLaw()) if name == "module" else None
    got = TRANSFORMS[transform](loss, scores)
    expected = TRANSFORMS[transform](lambda x, y: reference.pdl_loss(x, y, weights), scores)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_an_online_loss_counts_nothing_that_it_refuses():
    loss = PDLLoss(vocab_size=VOCAB)
    with pytest.raises(RuntimeError, match=REFUSED):
        func.vmap(loss)(LOSSES["loss"][0], TARGETS)
    assert loss.frequency.tokens_seen == 0


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["vmap", "grad", "vjp", "jacrev", "vmap of grad"])
@pytest.mark.parametrize("name", ["loss", "module", "linear"])
def test_compiled_transforms_are_refused(transform, name):
    # A tracer sees through their wrappers: the gradient was 0 then, and no error.
    scores, loss = LOSSES[name]
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.compile(lambda x: TRANSFORMS[transform](loss, x), backend="aot_eager")(scores)


@pytest.mark.parametrize("loss", [PDLLoss(torch.arange(VOCAB)), PDLLoss(vocab_size=VOCAB).eval()])
def test_functional_call_is_no_transform(loss):
    leaves = [LOSSES["loss"][0].clone().requires_grad_() for _ in range(2)]
    called = func.functional_call(loss, dict(loss.named_buffers()), (leaves[0], TARGETS))
    expected = loss(leaves[1], TARGETS)
    assert torch.equal(called, expected)
    called.backward()
    expected.backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert leaves[0].grad.any()


@pytest.mark.parametrize("name", ["loss", "linear"])
def test_autograd_jacobian(name):
    scores, loss = LOSSES[name]
    x = scores[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x, TARGETS[0]), x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(one(loss), scores[0]), expected)
    assert expected.any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loss", {}),
        ("loss", {"inplace_backward": True}),
        ("module", {}),
        ("linear", {}),
        ("linear", {"reduction": "token_mean"}),
        ("linear of a module", {}),
    ],
)
def test_a_batch_of_upstream_gradients(name, options):
    scores, loss = LOSSES[name]
    x = scores[0].clone().requires_grad_()
    value = loss(x * 1, TARGETS[0], **options)
    factors = torch.tensor([1.0, -3.0])
    (batch,) = torch.autograd.grad(value, x, factors, retain_graph=True, is_grads_batched=True)
    # The gradient of the loss's call is still there.
    (expected,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(batch, factors.view(-1, 1, 1) * expected)
    assert expected.any()
    jacobian = torch.autograd.functional.jacobian(one(loss), scores[0], vectorize=True)
    torch.testing.assert_close(jacobian, expected)


def test_reference_goes_with_all_of_them():
    logits, weights = LOSSES["loss"][0].double(), functional.token_weights(torch.arange(VOCAB), PowerLaw())

    def loss(scores, targets):
        return reference.pdl_loss(scores, targets, weights)

    rows = torch.stack([loss(x, t) for x, t in zip(logits, TARGETS, strict=True)])
    torch.testing.assert_close(func.vmap(loss)(logits, TARGETS), rows)
    gradients = func.vmap(func.grad(loss))(logits, TARGETS)
    leaf = logits.clone().requires_grad_()
    functional.pdl_loss(leaf[1], TARGETS[1], weights).backward()
    torch.testing.assert_close(gradients[1], leaf.grad[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "call",
    [
        lambda: func.vmap(lambda t: functional.count_tokens(t, VOCAB))(TARGETS),
        lambda: func.vmap(lambda c: functional.token_weights(c, PowerLaw()))(torch.ones(3, VOCAB, dtype=torch.int64)),
        lambda: func.vmap(lambda t: TokenFrequency(VOCAB).update(t))(TARGETS),
        lambda: func.vmap(TokenFrequency.from_counts)(torch.ones(3, VOCAB, dtype=torch.int64)),
        lambda: func.vmap(lambda w: functional.pdl_loss(LOSSES["loss"][0], TARGETS, w))(torch.ones(3, VOCAB)),
        lambda: func.vmap(lambda w: functional.linear_pdl_loss(torch.ones(4, 5), w, TARGETS[0]))(
            torch.ones(3, VOCAB, 5)
        ),
    ],
    ids=["count_tokens", "token_weights", "update", "from_counts", "a table", "a classifier"],
)
def test_counting_and_tables_are_refused_too(call):
    with pytest.raises(RuntimeError, match=REFUSED):
        call()
