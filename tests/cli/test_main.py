"""The command line itself: its first screen, what it imports, and `pdl-ext info`."""

import re
import shlex
from pathlib import Path

import fresh_python
import pytest
import torch

import pdl_ext
from pdl_ext.cli.main import main
from pdl_ext.engine.ops import _C


def test_info_tells_what_was_built(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    lines = {name: value.strip() for name, value in lines.items()}
    assert lines["PyTorch"].startswith(torch.__version__)
    assert lines["CPU capability"] == f"{_C.cpu_capability()}, {torch.get_num_threads()} threads"
    assert lines["CUDA kernels"].startswith(("built: ", "not built: "))
    assert (lines["CUDA architectures"] == "none") == lines["CUDA kernels"].startswith("not built")


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pdl_ext {pdl_ext.__version__}\n"


def test_a_wrong_command_exits_with_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["no-such-command"])
    assert exit_info.value.code == 2
    assert "usage: pdl-ext" in capsys.readouterr().err


@pytest.fixture
def first_screen(capsys):
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_without_a_command_three_things_are_told_that_one_does_first(first_screen, tmp_path, monkeypatch):
    """Each as it stands there, one after the other."""
    tokenizers = pytest.importorskip("tokenizers", reason="the first thing is to count text")
    commands, lines = [], []
    for step in re.findall(r"^\d\. .*:\n((?: {5}.*\n)+)", first_screen, flags=re.MULTILINE):
        told = [line.strip() for line in step.splitlines()]
        (commands if told[0].startswith("pdl-ext ") else lines).append(told)
    assert (len(commands), len(lines)) == (2, 1)
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("a b\na a\n")
    model = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")
    for (command,) in commands:
        assert main(shlex.split(command)[1:]) == 0
    assert Path("report.html").exists()
    namespace = {"pdl_ext": pdl_ext, "logits": torch.zeros(1, 3, 50257), "labels": torch.tensor([[1, 2, 1]])}
    exec("\n".join(*lines), namespace)
    assert namespace["loss_fn"].frequency.counts[:3].tolist() == [0, 3, 1]
    assert namespace["loss"].isfinite()


def test_the_first_screen_names_what_tells_more(first_screen, capsys):
    named = set(re.findall(r"`pdl-ext ([\w-]+)`", first_screen))
    assert named == {"--help", "doctor"}
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    listed = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, flags=re.MULTILINE))
    assert listed == {"count", "merge", "show", "plot", "explore", "info", "doctor", "demo"}


RUN = """
import sys
from pdl_ext.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
print(code, *sorted({"torch", "numpy", "tqdm", "safetensors"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("", 0),
        ("--help", 0),
        ("--version", 0),
        ("count --help", 0),
        ("demo --help", 0),
        ("doctor --help", 0),
        ("no-such-command", 2),
        ("count corpus/", 2),
        ("count corpus/ --vocab-size many", 2),
        ("count corpus/ --vocab-size 9", 1),
        ("merge a b", 2),
        ("show counts --weighting none", 2),
        ("demo --steps 0", 2),
    ],
)
def test_help_and_wrong_arguments_wait_for_no_package(command, code):
    told = fresh_python.run("-c", RUN, *command.split(), check=True).stdout.splitlines()[-1]
    assert told == str(code)


@pytest.mark.parametrize("command", ["plot counts -o a.pdf", "explore counts -o a.pdf"])
def test_a_wrong_name_of_an_output_waits_for_a_clock_at_most(command):
    run = fresh_python.run("-c", RUN, *command.split(), check=True)
    assert run.stdout == "1 tqdm\n"
    assert re.fullmatch(r"pdl-ext: output: got a\.pdf, expected a name that ends in .*\n", run.stderr)


def test_colours_are_for_nobody(capsys):
    for command in ([], ["info"], ["doctor"]):
        main(command)
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err


LACKING = """
import sys
sys.modules[sys.argv[1]] = None
from pdl_ext.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_package_that_is_missing_is_a_line_with_the_way_out():
    run = fresh_python.run("-c", LACKING, "torch", "info")
    assert run.returncode == 1
    assert re.fullmatch(r"pdl-ext: .*torch.*: run `pdl-ext doctor`\n", run.stderr)
    run = fresh_python.run("-c", LACKING, "matplotlib", "plot", "counts", "-o", "a.png")
    assert "doctor" not in run.stderr


PUBLIC = """
import sys, pdl_ext
print("torch" in sys.modules, set(pdl_ext.__all__) <= set(dir(pdl_ext)), hasattr(pdl_ext, "no_such_name"))
from pdl_ext import *
print(all(globals()[name] is getattr(pdl_ext, name) for name in pdl_ext.__all__))
print(pdl_ext.modulation.DFT(), pdl_ext.corpus.count_corpus.__name__, PDLLoss is pdl_ext.loss.PDLLoss)
"""


def test_public_names_are_imported_when_they_are_used():
    expected = "False True False\nTrue\nDFT() count_corpus True\n"
    assert fresh_python.run("-c", PUBLIC, check=True).stdout == expected


def test_a_public_name_that_is_none_is_an_error():
    with pytest.raises(AttributeError, match="module 'pdl_ext' has no attribute 'PDLLos'"):
        pdl_ext.PDLLos  # noqa: B018
    told = fresh_python.run("-c", "import pdl_ext; pdl_ext.PDLLos").stderr
    assert told.endswith("Did you mean: 'PDLLoss'?\n")
    with pytest.raises(ImportError, match="cannot import name 'PDLLos' from 'pdl_ext'"):
        exec("from pdl_ext import PDLLos")


NO_TORCH = """
import sys, pdl_ext
sys.modules["torch"] = None
try:
    pdl_ext.PDLLoss
except ImportError as error:
    print(error.name)
"""


def test_a_public_name_tells_of_a_package_that_it_lacks():
    assert fresh_python.run("-c", NO_TORCH, check=True).stdout == "torch\n"
