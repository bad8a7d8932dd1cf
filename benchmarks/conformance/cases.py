"""The requirements for a weighted cross-entropy, each case with its truth in float64 by the definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CASES", "Case", "NotOffered", "Task", "Way", "Wrong"]


class Wrong(Exception):
    """A result that contradicts the definition."""


class NotOffered(Exception):
    """A task for which a way has no argument."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A weighted cross-entropy: weight is float32 [V] or None, the truth is F.cross_entropy's in float64.

    normalizer: replaces the denominator of "mean".
    """

    targets: Tensor
    weight: Tensor | None = None
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    normalizer: float | None = None


@dataclasses.dataclass(frozen=True)
class Way:
    """An implementation: the loss of [logits], or of [hidden states, classifier]; it raises NotOffered.

    may_abort: an unsupported case ends the process.
    ranks: the number of processes that share the vocabulary; each of them calls `loss` with the whole scores.
    """

    name: str
    of_logits: bool
    loss: Callable[[list[Tensor], Task], Tensor]
    may_abort: bool = False
    ranks: int = 1


@dataclasses.dataclass(frozen=True)
class Case:
    """A named requirement; `check` raises Wrong."""

    name: str
    check: Callable[[Way], None]
    # None: for both kinds of ways.
    of_logits: bool | None = None
    # Whether ranks that share the vocabulary can show it: each has a copy of its own columns.
    of_ranks: bool = True

    def concerns(self, way: Way) -> bool:
        return self.of_logits in (None, way.of_logits) and (self.of_ranks or way.ranks == 1)


CASES: list[Case] = []

# The error of a row's gradient relative to its norm. A bfloat16 product rounds logits of about 4 by 2^-7.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LIMITS_OF_PRODUCTS = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 8e-3}


def case(
    name: str, of_logits: bool | None = None, of_ranks: bool = True
) -> Callable[[Callable[[Way], None]], Callable[[Way], None]]:
    def add(check: Callable[[Way], None]) -> Callable[[Way], None]:
        CASES.append(Case(name, check, of_logits, of_ranks))
        return check

    return add


def leaves_of(way: Way, rows: int = 33, vocab_size: int = 257, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits of standard deviation 2, or hidden states and a classifier that give such logits."""
    generator = torch.Generator().manual_seed(rows + vocab_size)
    width = 48
    hidden = torch.randn(rows, width, generator=generator, device="cpu")
    classifier = torch.randn(vocab_size, width, generator=generator, device="cpu") * 2 / width**0.5
    leaves = [hidden @ classifier.t()] if way.of_logits else [hidden, classifier]
    return [leaf.to(torch.get_default_device(), dtype).requires_grad_() for leaf in leaves]


def targets_of(rows: int = 33, vocab_size: int = 257, ignored: bool = True) -> Tensor:
    targets = torch.randint(vocab_size, (rows,), generator=torch.Generator().manual_seed(5), device="cpu")
    if ignored:
        targets[::4] = -100
    return targets.to(torch.get_default_device())


def weight_of(vocab_size: int = 257, spread: float = 1.0) -> Tensor:
    """Weights over several powers of e."""
    noise = torch.randn(vocab_size, generator=torch.Generator().manual_seed(7), device="cpu")
    return torch.exp(spread * noise).to(torch.get_default_device())


def true_loss(leaves: list[Tensor], task: Task) -> Tensor:
    """The loss by its definition, for float64 leaves."""
    logits = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].t()
    weight = None if task.weight is None else task.weight.double()
    options = {"ignore_index": task.ignore_index, "label_smoothing": task.label_smoothing}
    if task.normalizer is not None:
        return F.cross_entropy(logits, task.targets, weight, reduction="sum", **options) / task.normalizer
    return F.cross_entropy(logits, task.targets, weight, reduction=task.reduction, **options)


def compare(name: str, found: Tensor | None, expected: Tensor, limit: float) -> None:
    """Raises Wrong unless each row differs by less than a share of its norm, or of the largest row's 2^-40."""
    if found is None:
        raise Wrong(f"{name} is missing")
    if found.shape != expected.shape:
        raise Wrong(f"{name} has shape {list(found.shape)}, not {list(expected.shape)}")
    if not expected.numel():
        return
    rows = expected.reshape(expected.shape[0], -1) if expected.dim() > 1 else expected.reshape(-1, 1)
    difference = (found.double().reshape(rows.shape) - rows).norm(dim=1)
    allowed = limit * rows.norm(dim=1) + 2.0**-40 * rows.norm(dim=1).max()
    if not bool((difference <= allowed).all()):
        share = (difference / rows.norm(dim=1).clamp(min=1e-300)).max()
        raise Wrong(
            f"{name} has a relative error of {share:.1g}" if bool(share.isfinite()) else f"{name} is not finite"
        )


def check(way: Way, leaves: list[Tensor], task: Task, upstream: Tensor | None = None) -> None:
    """Checks the loss and the gradients of all leaves that require one."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = true_loss(exact, task)
    upstream = torch.ones_like(expected) if upstream is None else upstream
    expected.backward(upstream.double())
    limit = (LIMITS if way.of_logits else LIMITS_OF_PRODUCTS)[leaves[0].dtype]
    loss = way.loss(leaves, task)
    compare("the loss", loss.detach(), expected.detach(), limit)
    loss.backward(upstream.to(loss.dtype))
    names = ["the gradient"] if way.of_logits else ["the hidden states' gradient", "the classifier's gradient"]
    for name, leaf, truth in zip(names, leaves, exact, strict=True):
        if leaf.requires_grad:
            compare(name, leaf.grad, truth.grad, limit)


def uneven(targets: Tensor) -> Tensor:
    return torch.linspace(-2.0, 3.0, len(targets))


@case("mean")
def _(way: Way) -> None:
    check(way, leaves_of(way), Task(targets_of()))


@case("weighted mean, divided by the sum of weights")
def _(way: Way) -> None:
    check(way, leaves_of(way), Task(targets_of(), weight_of()))


@case("weighted sum")
def _(way: Way) -> None:
    check(way, leaves_of(way), Task(targets_of(), weight_of(), "sum"))


@case("weighted loss of each row, an upstream gradient for each row")
def _(way: Way) -> None:
    targets = targets_of()
    check(way, leaves_of(way), Task(targets, weight_of(), "none"), uneven(targets))


@case("the same, no row ignored")
def _(way: Way) -> None:
    targets = targets_of(ignored=False)
    check(way, leaves_of(way), Task(targets, weight_of(), "none"), uneven(targets))


@case("unweighted loss of each row, an upstream gradient for each row")
def _(way: Way) -> None:
    targets = targets_of()
    check(way, leaves_of(way), Task(targets, None, "none"), uneven(targets))


@case("weighted mean, an upstream gradient of 3")
def _(way: Way) -> None:
    check(way, leaves_of(way), Task(targets_of(), weight_of()), torch.tensor(3.0))


@case("weights over seven orders of magnitude")
def _(way: Way) -> None:
    check(way, leaves_of(way), Task(targets_of(), weight_of(spread=3.0)))


@case("weighted sum over a given number of items")
def _(way: Way) -> None:
    check(way, leaves_of(way), Task(targets_of(), weight_of(), normalizer=70.5))


@case("an ignore_index other than the default")
def _(way: Way) -> None:
    targets = targets_of()
    check(way, leaves_of(way), Task(targets.where(targets != -100, 3), weight_of(), ignore_index=3))


@case("all rows ignored: no NaN, gradients of 0")
def _(way: Way) -> None:
    leaves = leaves_of(way)
    loss = way.loss(leaves, Task(torch.full((33,), -100), weight_of()))
    if not bool(loss.isfinite()):
        raise Wrong(f"the loss is {float(loss)}")
    loss.backward()
    for leaf in leaves:
        compare("a gradient", leaf.grad, torch.zeros_like(leaf, dtype=torch.float64), 0.0)


@case("no rows: a sum of 0")
def _(way: Way) -> None:
    check(way, leaves_of(way, rows=0), Task(targets_of(0, ignored=False), weight_of(), "sum"))


@case("infinity in the logits of an ignored row", of_logits=True)
def _(way: Way) -> None:
    targets = targets_of()
    (logits,) = leaves_of(way)
    with torch.no_grad():
        logits[0] = torch.inf
    loss = way.loss([logits], Task(targets, weight_of()))
    loss.backward()
    (clean,) = leaves_of(way)
    truth = clean.detach().double().requires_grad_()
    expected = true_loss([truth], Task(targets, weight_of()))
    expected.backward()
    compare("the loss", loss.detach(), expected.detach(), LIMITS[torch.float32])
    compare("the gradient", logits.grad, truth.grad, LIMITS[torch.float32])


@case("label smoothing")
def _(way: Way) -> None:
    # The parts of two ranks have the same width.
    check(way, leaves_of(way, vocab_size=256), Task(targets_of(vocab_size=256), label_smoothing=0.1))


@case("label smoothing by class weights, as F.cross_entropy defines it")
def _(way: Way) -> None:
    check(way, leaves_of(way), Task(targets_of(), weight_of(), label_smoothing=0.1))


@case("masked logits of -inf", of_logits=True)
def _(way: Way) -> None:
    targets = targets_of()
    (logits,) = leaves_of(way)
    with torch.no_grad():
        masked = logits < -1
        masked[torch.arange(33), targets.clamp(min=0)] = False
        logits[masked] = -torch.inf
    check(way, [logits], Task(targets, weight_of()))


@case("-inf in all of the first 40,000 columns", of_logits=True)
def _(way: Way) -> None:
    (logits,) = leaves_of(way, rows=5, vocab_size=70_001)
    with torch.no_grad():
        logits[:, :40_000] = -torch.inf
    check(way, [logits], Task(torch.arange(60_000, 60_005), weight_of(70_001)))


@case("a target of -inf: a loss of infinity", of_logits=True)
def _(way: Way) -> None:
    (logits,) = leaves_of(way)
    targets = targets_of(ignored=False)
    with torch.no_grad():
        logits[2, targets[2]] = -torch.inf
    task = Task(targets, weight_of(), "none")
    losses = way.loss([logits], task).detach()
    if not bool(losses[2] == torch.inf):
        raise Wrong(f"the loss is {float(losses[2])}")
    others = torch.arange(33) != 2
    truth = true_loss([logits.detach().double()], task)
    compare("the loss of another row", losses[others], truth[others], LIMITS[torch.float32])


@case("a common offset of 10,000: no digits lost", of_logits=True)
def _(way: Way) -> None:
    (logits,) = leaves_of(way)
    check(way, [(logits.detach() + 10_000).requires_grad_()], Task(targets_of(), weight_of()))


@case("logits of 80, and targets near certain and near impossible", of_logits=True)
def _(way: Way) -> None:
    (logits,) = leaves_of(way)
    check(way, [(10 * logits.detach()).requires_grad_()], Task(targets_of(), weight_of(), "none"), uneven(targets_of()))


@case("bfloat16, weighted mean")
def _(way: Way) -> None:
    check(way, leaves_of(way, dtype=torch.bfloat16), Task(targets_of(), weight_of()))


@case("bfloat16, weighted loss of each row")
def _(way: Way) -> None:
    targets = targets_of()
    check(way, leaves_of(way, dtype=torch.bfloat16), Task(targets, weight_of(), "none"), uneven(targets))


@case("float16, weighted mean")
def _(way: Way) -> None:
    check(way, leaves_of(way, dtype=torch.float16), Task(targets_of(), weight_of()))


@case("bfloat16, the loss to five digits", of_logits=True)
def _(way: Way) -> None:
    leaves = leaves_of(way, dtype=torch.bfloat16)
    task = Task(targets_of(), weight_of())
    truth = true_loss([leaf.detach().double() for leaf in leaves], task)
    compare("the loss", way.loss(leaves, task).detach(), truth, 1e-5)


@case("bfloat16, the gradient of a target of probability 0.999", of_logits=True)
def _(way: Way) -> None:
    (logits,) = leaves_of(way, dtype=torch.bfloat16)
    targets = targets_of(ignored=False)
    with torch.no_grad():
        logits[torch.arange(33), targets] = 16.0
    truth = logits.detach().double().requires_grad_()
    task = Task(targets, None, "sum")
    true_loss([truth], task).backward()
    way.loss([logits], task).backward()
    places = (torch.arange(33), targets)
    compare("the target's gradient", logits.grad[places], truth.grad[places], 1e-2)


@case("every element of a small gradient")
def _(way: Way) -> None:
    leaves = leaves_of(way, rows=64, vocab_size=4001)
    task = Task(targets_of(64, 4001), weight_of(4001, 2.0))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    true_loss(exact, task).backward()
    way.loss(leaves, task).backward()
    # The classifier's rows, or the logits' columns, of tokens that are not targets.
    never = torch.ones(4001, dtype=torch.bool)
    never[task.targets[task.targets >= 0]] = False
    found, truth = leaves[-1].grad, exact[-1].grad
    counted = task.targets != -100
    found, truth = (
        (found[counted][:, never], truth[counted][:, never]) if way.of_logits else (found[never], truth[never])
    )
    compare("a small gradient", found.reshape(-1, 1), truth.reshape(-1, 1).clone(), 5e-2 if not way.of_logits else 1e-3)


@case("bfloat16, the classifier's gradient over 6,000 rows", of_logits=False)
def _(way: Way) -> None:
    targets = targets_of(6000, 33)
    check(way, leaves_of(way, rows=6000, vocab_size=33, dtype=torch.bfloat16), Task(targets, weight_of(33)))


@case("logits are unchanged afterwards, or PyTorch detects the change", of_logits=True, of_ranks=False)
def _(way: Way) -> None:
    (leaf,) = leaves_of(way)
    logits = leaf * 1.0
    before, version = logits.detach().clone(), logits._version
    way.loss([logits], Task(targets_of(), weight_of())).backward()
    if not torch.equal(logits.detach(), before) and logits._version == version:
        raise Wrong("the logits are overwritten in silence")


@case("a second loss of the same scores: the gradients add up, or an error", of_ranks=False)
def _(way: Way) -> None:
    leaves = leaves_of(way)
    scores = [leaf * 1.0 for leaf in leaves]
    task = Task(targets_of(), weight_of())
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    (true_loss(exact, task) + exact[0].square().sum()).backward()
    square = scores[0].square().sum()
    loss = way.loss(scores, task)
    try:
        (loss + square).backward()
    except RuntimeError:
        return
    for leaf, truth in zip(leaves, exact, strict=True):
        compare("a gradient", leaf.grad, truth.grad, LIMITS_OF_PRODUCTS[torch.float32])


@case("backward twice with retain_graph: twice the gradient, or an error")
def _(way: Way) -> None:
    leaves = leaves_of(way)
    task = Task(targets_of(), weight_of())
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    (2 * true_loss(exact, task)).backward()
    # What fails without retain_graph as well is no refusal of it.
    torch.autograd.grad(way.loss(leaves, task), leaves)
    loss = way.loss(leaves, task)
    try:
        loss.backward(retain_graph=True)
        loss.backward()
    except RuntimeError:
        return
    for leaf, truth in zip(leaves, exact, strict=True):
        compare("a gradient", leaf.grad, truth.grad, LIMITS_OF_PRODUCTS[torch.float32])


@case("a gradient penalty: its own gradient, or an error")
def _(way: Way) -> None:
    leaves = leaves_of(way, rows=9, vocab_size=17)
    task = Task(targets_of(9, 17), weight_of(17))

    def of_penalised(loss: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss, of, create_graph=True)
        return torch.autograd.grad(loss + sum(g.square().sum() for g in first), of)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = of_penalised(true_loss(exact, task), exact)
    # What fails without a penalty as well is no refusal of one.
    torch.autograd.grad(way.loss(leaves, task), leaves)
    try:
        found = of_penalised(way.loss(leaves, task), leaves)
    except RuntimeError:
        return
    for gradient, truth in zip(found, expected, strict=True):
        compare("a gradient", gradient, truth, 1e-3)


@case("gradients of two calls add up")
def _(way: Way) -> None:
    leaves = leaves_of(way)
    task = Task(targets_of(), weight_of())
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    (2 * true_loss(exact, task)).backward()
    for _ in range(2):
        way.loss([leaf * 1.0 for leaf in leaves], task).backward()
    for leaf, truth in zip(leaves, exact, strict=True):
        compare("a gradient", leaf.grad, truth.grad, LIMITS_OF_PRODUCTS[torch.float32])


@case("a frozen classifier", of_logits=False)
def _(way: Way) -> None:
    hidden, classifier = leaves_of(way)
    check(way, [hidden, classifier.detach()], Task(targets_of(), weight_of()))


@case("frozen hidden states", of_logits=False)
def _(way: Way) -> None:
    hidden, classifier = leaves_of(way)
    check(way, [hidden.detach(), classifier], Task(targets_of(), weight_of()))


@case("without gradients: the same loss")
def _(way: Way) -> None:
    leaves = leaves_of(way)
    task = Task(targets_of(), weight_of())
    with torch.no_grad():
        loss = way.loss(leaves, task)
    compare("the loss", loss, true_loss([leaf.detach().double() for leaf in leaves], task), 1e-5)


@case("the columns of a padded vocabulary", of_logits=True, of_ranks=False)
def _(way: Way) -> None:
    check_view(way, leaves_of(way, vocab_size=264)[0], lambda wide: wide[:, :257])


@case("transposed logits", of_logits=True, of_ranks=False)
def _(way: Way) -> None:
    check_view(way, leaves_of(way, rows=257, vocab_size=33)[0], lambda turned: turned.t())


def check_view(way: Way, leaf: Tensor, view: Callable[[Tensor], Tensor]) -> None:
    """The gradient of a model's output, through a view of it."""
    task = Task(targets_of(), weight_of())
    truth = leaf.detach().double().requires_grad_()
    true_loss([view(truth)], task).backward()
    way.loss([view(leaf * 1.0)], task).backward()
    compare("the gradient", leaf.grad, truth.grad, LIMITS[torch.float32])


@case("a vocabulary of 50,257")
def _(way: Way) -> None:
    check(way, leaves_of(way, rows=9, vocab_size=50_257), Task(targets_of(9, 50_257), weight_of(50_257)))


@case("one row")
def _(way: Way) -> None:
    check(way, leaves_of(way, rows=1), Task(targets_of(1, ignored=False), weight_of()))


@case("two classes")
def _(way: Way) -> None:
    check(way, leaves_of(way, vocab_size=2), Task(targets_of(33, 2), weight_of(2)))


@case("a target outside of the vocabulary: an error or NaN")
def _(way: Way) -> None:
    targets = targets_of(ignored=False)
    targets[3] = 1000
    try:
        loss = way.loss(leaves_of(way), Task(targets, None, "sum"))
    except (IndexError, RuntimeError):
        return
    if bool(loss.isfinite()):
        raise Wrong(f"the loss is {float(loss):.4g}")


@case("the same bits in two calls")
def _(way: Way) -> None:
    found = []
    for _ in range(2):
        leaves = leaves_of(way, rows=64, vocab_size=4001)
        loss = way.loss(leaves, Task(targets_of(64, 4001), weight_of(4001)))
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
        raise Wrong("they differ")
