"""`pdl-ext explore`: a page of bounded size, written completely or not at all, in which data are only data."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch

from pdl_ext import TokenFrequency
from pdl_ext.cli.explore.page import page_of
from pdl_ext.cli.main import main


@pytest.fixture
def counts(tmp_path):
    TokenFrequency.from_counts(torch.tensor([0, 5, 900, 1, 94, 5, 0])).save(tmp_path / "counts")
    return tmp_path / "counts"


def data_of(page: bytes) -> dict:
    (text,) = re.findall(rb'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(text)


def without_text(token: int) -> str:
    return ""


def test_writes_one_page_that_replaces_itself(counts, tmp_path, capsys):
    output = tmp_path / "report.html"
    # An empty file is no loss.
    output.touch()
    assert main(["explore", str(counts), "-o", str(output)]) == 0
    first = output.read_bytes()
    assert first.startswith(b"<!DOCTYPE html>")
    assert main(["explore", str(counts), "-o", str(output)]) == 0
    assert output.read_bytes() == first
    assert capsys.readouterr().out.split() == [str(output)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counts", "report.html"]


def test_holds_every_count(counts):
    data = data_of(page_of(TokenFrequency.load(counts), counts, without_text))
    held = torch.tensor(data["gaps"]).cumsum(0).repeat_interleave(torch.tensor(data["types"]))
    assert held.tolist() == [0, 0, 1, 5, 5, 94, 900]
    assert [token[:2] for token in data["tokens"]] == [[0, 2], [1, 4], [2, 1], [3, 5], [4, 3]]
    assert (data["total"], data["vocabulary"]) == (1005, 7)


def test_rare_tokens_are_of_the_last_twentieth():
    frequency = TokenFrequency.from_counts(10**6 // torch.arange(1, 10_001))
    data = data_of(page_of(frequency, Path("counts"), without_text))
    ids = dict(token[:2] for token in data["tokens"])
    rare = torch.tensor([ids[rank] for rank in data["rare"]])
    assert len(rare) == 12
    assert (frequency.buckets()[rare] == 2).all()
    assert rare.diff().unique().numel() <= 2, "evenly spaced"
    assert rare[-1] == 9_999


# Of a corpus of 10^13 tokens hardly any two of the more frequent types occur equally often.
@pytest.mark.parametrize("most", [10**7, 10**12])
def test_250_000_types_stay_below_2_mb(most):
    frequency = TokenFrequency.from_counts((most / torch.arange(1, 250_001).double() ** 1.1).long())
    assert len(page_of(frequency, Path("counts"), without_text)) < 2_000_000


@pytest.mark.parametrize(
    "text", ["</script>", "<script>x()</script>", "<!--", "\u2028", "\udcff", "&lt;", "$data", "\0"]
)
def test_what_data_say_is_data(text):
    frequency = TokenFrequency.from_counts(torch.tensor([2, 1]))
    page = page_of(frequency, Path(f"{text}.safetensors"), lambda token: text)
    assert [token[2] for token in data_of(page)["tokens"]] == [text, text]
    assert data_of(page)["file"] == f"{text}.safetensors"
    assert page.count(b"</script>") == 2
    assert page.count(b"<script") == 2
    data = page.partition(b'id="data">')[2].partition(b"</script>")[0]
    assert data.isascii()
    assert b"<" not in data


def test_the_policy_lets_nothing_in_but_the_page_s_own():
    page = page_of(TokenFrequency.from_counts(torch.tensor([1])), Path("counts"), without_text).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', page)[1]
    held = [re.search(rf"<{tag}>(.*?)</{end}>", page, flags=re.DOTALL)[1] for tag, end in TAGS]
    script, style = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in held)
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; base-uri 'none'; "
        "form-action 'none'"
    )
    # Nothing is named that would have to be fetched; that of SVG is a name and no address.
    assert re.findall(r"(?:src|href|url|import)\s*[=(]|https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]


TAGS = [('script type="module"', "script"), ("style", "style")]


def test_what_makes_no_page(counts, tmp_path, capsys, monkeypatch):
    TokenFrequency(3).save(tmp_path / "empty")
    (tmp_path / "mine.html").write_text("<!DOCTYPE html>\n<html>\n")
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.iterdir())
    new = str(tmp_path / "new.html")
    for arguments, message in [
        ([str(counts), "-o", str(tmp_path / "a.pdf")], "a.pdf, expected a name that ends in .html"),
        ([str(counts), "-o", str(tmp_path / "no" / "a.html")], "no/a.html, expected a file in a folder that exists"),
        ([str(counts), "-o", str(tmp_path / "folder.html")], "folder.html, a folder, expected a file"),
        ([str(counts), "-o", str(tmp_path / "mine.html")], "mine.html, a file that `pdl-ext explore` did not write"),
        ([str(tmp_path / "empty"), "-o", new], "empty, in which nothing was counted, expected some tokens"),
        (
            [str(tmp_path / "mine.html"), "-o", new],
            f"counts: {tmp_path}/mine.html is damaged or not a safetensors file",
        ),
        ([str(tmp_path / "gone"), "-o", new], "gone, expected one that `pdl-ext count` wrote"),
        ([str(counts), "-o", new, "--tokenizer", "gone.json"], "gone.json: cannot be read (No such file or directory)"),
    ]:
        assert main(["explore", *arguments]) == 1
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert message in captured.err
        assert captured.out == ""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main(["explore", str(counts), "-o", new]) == 1
    assert f"No space left on device; not written: {new}" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "mine.html").read_text() == "<!DOCTYPE html>\n<html>\n"
