"""`pdl-ext plot`: a picture, written completely or not at all."""

from __future__ import annotations

import os
import xml.etree.ElementTree

import pytest
import torch

from pdl_ext import TokenFrequency
from pdl_ext.cli.main import main

pytest.importorskip("matplotlib")


@pytest.fixture
def counts(tmp_path):
    (tmp_path / "in").mkdir()
    TokenFrequency.from_counts(10**7 // torch.arange(1, 100_001)).save(tmp_path / "in" / "counts")
    return tmp_path / "in" / "counts"


@pytest.mark.slow
def test_png(counts, tmp_path, capsys):
    assert main(["plot", str(counts), "-o", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.png")


def test_a_single_type_is_seen(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    TokenFrequency.from_counts(torch.tensor([4, 0])).save(tmp_path / "counts")
    assert main(["plot", str(tmp_path / "counts"), "-o", str(tmp_path / "a.png"), "--alpha", "0.5"]) == 0
    # Below the legend, in the colour of the weights.
    red, green, blue, _ = torch.from_numpy(image.imread(tmp_path / "a.png").copy())[100:].unbind(-1)
    assert ((blue - red > 0.4) & (green < 0.7)).any()


@pytest.mark.slow
def test_svg_is_small_and_the_same_each_time(counts, tmp_path):
    pictures = []
    for name in ("a.svg", "b.SVG"):
        assert main(["plot", str(counts), "-o", str(tmp_path / name), "--alpha", "0.3"]) == 0
        xml.etree.ElementTree.parse(tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert len(pictures[0]) < 200_000
    assert pictures[0] == pictures[1]


def test_what_cannot_be_drawn(counts, tmp_path, capsys, monkeypatch):
    TokenFrequency(3).save(tmp_path / "in" / "empty")
    for arguments, message in [
        ([str(counts), "-o", str(tmp_path / "a.pdf")], "expected a name that ends in .png or .svg"),
        ([str(tmp_path / "in" / "empty"), "-o", str(tmp_path / "a.png")], "nothing was counted"),
        ([str(counts), "-o", str(tmp_path / "a.png"), "--alpha", "-1"], "alpha: got -1.0"),
        (
            [str(counts), "-o", str(tmp_path / "no" / "a.png")],
            f"output: got {tmp_path}/no/a.png, expected a file in a folder that exists",
        ),
    ]:
        assert main(["plot", *arguments]) == 1
        assert message in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main(["plot", str(counts), "-o", str(tmp_path / "a.png")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
