"""`pdl-ext doctor`: checks that the installed parts fit together, and names the command that mends them.

It begins without any other package, since one that cannot be imported is what most people ask about.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from pdl_ext.cli.streams import write

__all__ = ["EXTRAS", "add_parser"]

# The extras for users, with their purposes. The others are for work on pdl_ext itself.
EXTRAS = {
    "corpus": "counts columns, text and compressed files",
    "chat": "counts chats as they are trained on",
    "remote": "reads object stores, Hugging Face and web servers",
    "plot": "draws counts: `pdl-ext plot`",
    "transformers": "the Trainer of transformers",
    "trl": "the trainers of TRL",
    "ray": "counts a Ray dataset",
    "demo": "`pdl-ext demo`",
}
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?(?:>=([\d.]+))?(?:; extra == [\"']([\w-]+)[\"'])?")
_WIDTH = len("package typing_extensions")
_ROWS, _TYPES = 64, 1000
# float32 sums in another order, with room.
_TOLERANCE = 1e-4


class Finding(NamedTuple):
    """The result of a check; `remedy` is the command to run if something is missing or wrong."""

    state: Literal["ok", "absent", "wrong"]
    subject: str
    told: str
    remedy: str = ""


class Requirement(NamedTuple):
    """A package, and its least version that serves; empty for any."""

    name: str
    least: str

    def __str__(self) -> str:
        return f"{self.name}>={self.least}" if self.least else self.name


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the sub-command `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="check that versions, extras and CUDA kernels fit together",
        description="Checks the installation: versions, extras, the compiled module and its CUDA kernels. Compares a "
        "loss with PyTorch's on each device. If something is wrong, it prints the command to run, and exits with 1.",
    )
    parser.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> int:
    wrong = 0
    for state, subject, told, remedy in itertools.chain(_packages(), _compiled(), _extras()):
        # At once, since the next check may take seconds.
        write(f"{state:6}  {subject:{_WIDTH}}  {told}", *([f"{'':{_WIDTH + 8}}  {remedy}"] if remedy else []))
        wrong += state == "wrong"
    write(f"{wrong} wrong" if wrong else "all installed parts fit together")
    return 1 if wrong else 0


def _packages() -> Iterator[Finding]:
    """The packages that pdl_ext cannot do without."""
    if _listed() is None:
        remedy = "in the source folder run: pip install -e ."
        yield Finding("absent", "package pdl_ext", "is not installed, so no versions are known that it needs", remedy)
        return
    for requirement in _requirements(None):
        version = _version(requirement.name)
        subject, remedy = f"package {requirement.name}", f'run: pip install --upgrade "{requirement}"'
        needed = f"{requirement.least} or later" if requirement.least else "any version"
        if version is None:
            yield Finding("wrong", subject, f"is not installed, expected {needed}", remedy)
        elif _is_older(version, requirement.least):
            yield Finding("wrong", subject, f"got {version}, expected {needed}", remedy)
        else:
            yield Finding("ok", subject, f"{version} ({needed})")


def _extras() -> Iterator[Finding]:
    for extra, purpose in EXTRAS.items() if _listed() is not None else ():
        versions = {requirement: _version(requirement.name) for requirement in dict.fromkeys(_requirements(extra))}
        missing = [str(requirement) for requirement, version in versions.items() if version is None]
        old = {
            requirement: version
            for requirement, version in versions.items()
            if version is not None and _is_older(version, requirement.least)
        }
        subject, remedy = f"extra {extra}", f'run: pip install "pdl_ext[{extra}]"'
        if old:
            told = ", ".join(
                f"got {each.name} {version}, expected {each.least} or later" for each, version in old.items()
            )
            remedy = f"run: pip install --upgrade {' '.join(shlex.quote(str(each)) for each in old)}"
            yield Finding("wrong", subject, told, remedy)
        elif missing:
            yield Finding("absent", subject, f"{purpose}; not installed: {', '.join(missing)}", remedy)
        else:
            yield Finding("ok", subject, purpose)


def _listed() -> list[str] | None:
    """The requirements as the package's metadata have them; None where it is not installed."""
    try:
        return metadata.requires("pdl_ext") or []
    except metadata.PackageNotFoundError:
        return None


def _requirements(extra: str | None) -> Iterator[Requirement]:
    """Those of an extra and of the extras that it takes in; of None those without which nothing works."""
    for line in _listed() or ():
        found = _REQUIREMENT.fullmatch(line)
        # Others are of extras for work on pdl_ext.
        if found is None or found[4] != extra:
            continue
        if found[1] == "pdl_ext":
            for other in found[2].split(","):
                yield from _requirements(other)
        else:
            yield Requirement(found[1], found[3] or "")


def _version(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_older(version: str, least: str) -> bool:
    """Whether a version is before another one by its numbers: of a release that is being made the release counts."""
    return bool(least) and _numbers(version) < _numbers(least)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)", version)
    numbers = [int(number) for number in found[1].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _compiled() -> Iterator[Finding]:
    """The compiled module, its CUDA kernels, and a loss on each device, as far as one can come."""
    try:
        torch = importlib.import_module("torch")
    # Libraries that PyTorch needs are looked for as files.
    except (ImportError, OSError) as error:
        remedy = "install a PyTorch for this system: https://pytorch.org/get-started/locally/"
        yield Finding("wrong", "PyTorch", f"cannot be imported: {_line(error)}", remedy)
        return
    try:
        from pdl_ext.engine.ops import _C as module
    except ImportError as error:
        yield Finding("wrong", "compiled module", _line(error), f"run: {_rebuild()}")
        return
    yield Finding(
        "ok", "compiled module", f"built with PyTorch {module.built_with_torch()}, runs with {torch.__version__}"
    )
    yield _kernels(torch, module)
    yield _loss(torch, torch.device("cpu"), "report it with the output of `pdl-ext info`")
    if module.cuda_architectures() and torch.version.cuda is not None:
        yield from _cards(torch, module.cuda_architectures())


def _kernels(torch: Any, module: Any) -> Finding:
    """Whether there are CUDA kernels where they could be of use."""
    subject, status = "CUDA kernels", module.cuda_status()
    if module.cuda_architectures():
        if torch.version.cuda is None:
            return Finding("wrong", subject, f"{status}, but this PyTorch has no CUDA", f"run: {_rebuild()}")
        cards = f"PyTorch sees {torch.cuda.device_count() or 'no'} CUDA devices"
        return Finding("ok", subject, f"{status}, for {module.cuda_architectures()}; {cards}")
    if torch.version.cuda is None:
        return Finding("ok", subject, f"{status}; none are needed")
    remedy = f"where nvcc of CUDA {torch.version.cuda} is, run: PDL_EXT_CUDA=1 {_rebuild()}"
    if not torch.cuda.device_count():
        return Finding("absent", subject, f"{status}; PyTorch sees no CUDA device", remedy)
    return Finding("wrong", subject, f"{status}, but PyTorch sees {torch.cuda.get_device_name(0)}", remedy)


def _cards(torch: Any, architectures: str) -> Iterator[Finding]:
    """Each card: whether there is code for it, and a loss."""
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        major, minor = torch.cuda.get_device_capability(device)
        remedy = f"run: TORCH_CUDA_ARCH_LIST={major}.{minor} PDL_EXT_CUDA=1 {_rebuild()}"
        if _covers(architectures, major, minor):
            yield _loss(torch, device, remedy)
        else:
            told = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, the kernels are for {architectures}"
            yield Finding("wrong", f"loss on {device}", told, remedy)


def _covers(architectures: str, major: int, minor: int) -> bool:
    """Whether kernels for "750,800" may run on a card. One that is newer than all compiles their PTX."""
    numbers = [int(number) // 10 for number in re.findall(r"\d+", architectures)]
    card = 10 * major + minor
    return not numbers or card > max(numbers) or any(each // 10 == major and each <= card for each in numbers)


def _loss(torch: Any, device: Any, remedy: str) -> Finding:
    """Counts, weights, loss and gradient of some rows, beside PyTorch's own."""
    subject = f"loss on {device}"
    try:
        error = _distance(torch, device)
    except Exception as failure:
        return Finding("wrong", subject, f"fails: {_line(failure)}", remedy)
    if not error <= _TOLERANCE:
        told = f"differs from PyTorch's by {error:.1e} of it, expected {_TOLERANCE:.0e} at most"
        return Finding("wrong", subject, told, remedy)
    return Finding("ok", subject, "counts, loss and gradient are those of PyTorch")


def _distance(torch: Any, device: Any) -> float:
    """How far counts, loss and gradient are from PyTorch's, the largest of the three, each over PyTorch's own size."""
    pdl_ext: Any = importlib.import_module("pdl_ext")
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(_ROWS, _TYPES, generator=random, dtype=torch.float32, device="cpu").to(device)
    targets = torch.randint(_TYPES, (_ROWS,), generator=random, device="cpu").to(device)
    frequency = pdl_ext.TokenFrequency(_TYPES).to(device)
    frequency.update(targets)
    weights = pdl_ext.PowerLaw(alpha=0.5).weights(frequency)
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = pdl_ext.functional.pdl_loss(found, targets, weights)
    truth = torch.nn.functional.cross_entropy(expected, targets, weight=weights)
    loss.backward()
    truth.backward()
    counts = torch.bincount(targets, minlength=_TYPES)
    pairs = ((frequency.counts, counts), (loss.detach(), truth.detach()), (found.grad, expected.grad))
    distances = [(got.double() - true).norm() / true.double().norm() for got, true in pairs]
    # Python's max would overlook a NaN.
    return float(torch.stack(distances).max())


def _rebuild() -> str:
    """The pip command that builds pdl_ext for the PyTorch that is there, from the folder that it came from."""
    command = "pip install --no-deps --force-reinstall"
    used = Path(__file__).resolve().parents[2]
    if (used / "build_backend.py").is_file():
        return f"{command} -e {shlex.quote(str(used))}"
    origin = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        origin = json.loads(metadata.distribution("pdl_ext").read_text("direct_url.json") or "{}")
    if "dir_info" in origin:
        return f"{command} {shlex.quote(unquote(urlsplit(origin['url']).path))}"
    return f"{command} FOLDER (that of pdl_ext's sources)"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
