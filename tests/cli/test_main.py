"""The command line itself, and `pdl-ext info`."""

import pytest
import torch

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


@pytest.mark.parametrize("arguments", [[], ["no-such-command"]])
def test_a_wrong_command_exits_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: pdl-ext" in capsys.readouterr().err
