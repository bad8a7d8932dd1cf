"""The check of sentences: their beginning and end, their words, and the files."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("markdown_it", reason="the check of sentences is a contributor's tool")
pytest.importorskip("pygments", reason="the check of sentences is a contributor's tool")

from long_sentences import ROOT, files, main, sentences


def texts(source: str, kind: str = "markdown") -> list[str]:
    return [" ".join(sentence.words) for sentence in sentences(source, kind)]


def lines(source: str, kind: str) -> list[int]:
    return [sentence.line for sentence in sentences(source, kind)]


@pytest.mark.parametrize(
    "one",
    [
        "Some dtypes, e.g. int32 or Half, i.e. Ones that fit, are read.",
        "See Fig. 3 of Lee et al. Nothing else is needed.",
        "It is eager vs. Compiled code.",
        "It reads masks, offsets etc. and nothing else.",
        "PyTorch 2.10.0 takes 0.5 ms in loss.cu for it.",
        "First this; then that: all of it.",
        "It says (why not?) and goes on.",
        "It counts ... and goes on.",
        "Run it in . A dot is a folder.",
        "`a. B` is a span.",
    ],
)
def test_what_ends_no_sentence(one: str):
    assert len(texts(one)) == 1


@pytest.mark.parametrize(
    "two",
    [
        ("It is over.", "Now another begins."),
        ("Is it over?", "1 is not."),
        ("It is `x`.", "`y` follows."),
        ("It is V.", "V is large."),
        ("It reads masks etc.", "The others are not read."),
        ("It is in loss.cu.", "loss.cpp has it, too."),
        ("So it says.", "pdl_ext does."),
        ("It is twelve.", "numpy then reads it."),
        ('He said "stop."', "So they did."),
        ("It is so (as told.)", "It stays so."),
    ],
)
def test_what_ends_a_sentence(two: tuple[str, str]):
    expected = [part.replace("`", "") for part in two]
    assert texts(" ".join(two)) == expected
    assert texts("\n".join(two)) == expected


def test_words_have_a_letter_or_a_digit_and_code_is_one():
    (sentence,) = sentences("The *sum* - of `a. B + c` and [two words](https://x.y/z) = 25,000 / `+`.", "markdown")
    assert sentence.words == ("The", "sum", "of", "a. B + c", "and", "two", "words", "25,000", "+.")


def test_blocks_of_markdown():
    source = """\
# A heading

Before a list:
- first item
  goes on
- second item

| left | right |
|---|---|
| a cell. Two | `c \\| d` |

    code is none

```python
neither = this
```
> quoted
1. numbered
"""
    expected = ["A heading", "Before a list:", "first item goes on", "second item", "left", "right", "a cell.", "Two"]
    assert texts(source) == [*expected, "c | d", "quoted", "numbered"]
    assert lines(source, "markdown") == [1, 3, 4, 6, 8, 8, 10, 10, 10, 17, 18]


def test_docstrings_at_any_depth():
    source = '''\
"""Of the module."""
class A:
    """Of the class."""
    x: int
    """Of the attribute."""
    def f(self):
        if self:
            try:
                pass
            except ValueError:
                def g():
                    """Of the function
                    inside. And more."""
            else:
                match x:
                    case 1:
                        """In a case."""
            finally:
                """At the end."""
        return "Not prose. Really."
'''
    expected = [
        "Of the module.",
        "Of the class.",
        "Of the attribute.",
        "Of the function inside.",
        "And more.",
        "In a case.",
        "At the end.",
    ]
    assert sorted(texts(source, "python")) == sorted(expected)
    assert sorted(lines(source, "python")) == [1, 3, 5, 12, 13, 17, 19]


def test_sections_of_docstrings():
    source = '''\
def f():
    """Does it.

    Args:
        alpha, beta: the exponent
            of all. A second
            sentence: it
            goes: on
        gamma (int): another one: really
        **delta: the rest

    It goes on:
        x = code()

    Returns:
        What it makes
        of it.
    """
'''
    expected = [
        "Does it.",
        "Args:",
        "the exponent of all.",
        "A second sentence: it goes: on",
        "another one: really",
        "the rest",
    ]
    assert texts(source, "python") == [*expected, "It goes on:", "Returns:", "What it makes of it."]
    assert lines(source, "python") == [2, 4, 5, 6, 9, 10, 12, 15, 16]


def test_comments_of_python():
    source = """\
#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 Somebody
# One sentence
# over two lines. Another
#
# A new paragraph
x = "# no comment"  # Behind code
                    # and on.
y = 1  # Behind y
z = 1  # noqa: E501
w = 1  # type: ignore[no-any-return]
# old = f(x, y)
# del old
    # Another column
# and back
"""
    expected = ["One sentence over two lines.", "Another", "A new paragraph", "Behind code and on.", "Behind y"]
    assert texts(source, "python") == [*expected, "Another column", "and back"]
    assert lines(source, "python") == [4, 5, 7, 8, 10, 15, 16]


def test_messages_of_python():
    source = """
raise ValueError(f"{name}: got {value!r}, expected a number. " "Pass one.")
warnings.warn("it is slow" if slow else "it is wrong", stacklevel=2)
parser.add_argument("--flag", help="what it does", metavar="NO PROSE")
parser.error(f"{given} is no file")
print("a table, or a report")
"""
    expected = ["x: got x, expected a number.", "Pass one.", "it is slow", "it is wrong"]
    assert texts(source, "python") == [*expected, "what it does", "x is no file"]
    assert lines(source, "python") == [2, 2, 3, 3, 4, 5]


def test_comments_of_cpp():
    source = """\
// One sentence
// over two lines.
#include <vector>
/* A block
 * of two lines. */
/// For a tool.

// <vector>
// is included.
const char* s = "// no comment";  // Behind code
int n = 1'000'000;                // another
// old(s);

// vector<float> has `<a b>` in it:
//     not + prose
void f(int /* inside */);  // NOLINT
"""
    expected = [
        "One sentence over two lines.",
        "A block of two lines.",
        "For a tool.",
        "<vector> is included.",
        "Behind code",
        "another",
    ]
    found = sorted(zip(lines(source, "cpp"), texts(source, "cpp"), strict=True))
    assert [text for _, text in found] == [*expected, "vector<float> has <a b> in it:", "inside"]
    assert [line for line, _ in found] == [1, 4, 6, 8, 10, 11, 14, 16]


@pytest.mark.parametrize("kind", ["make", "cmake", "bash", "toml", "yaml"])
def test_comments_of_other_languages(kind: str):
    assert texts("# One sentence\n# over two lines. Another\n", kind) == ["One sentence over two lines.", "Another"]


def test_a_comment_in_a_recipe():
    source = (
        "all:\n\t# One sentence\n\t# over two lines. Another\n\t@# A third\n\t@# goes on.\n\techo x  # Behind code\n"
    )
    assert texts(source, "make") == ["One sentence over two lines.", "Another", "A third goes on.", "Behind code"]
    assert lines(source, "make") == [2, 3, 4, 6]


@pytest.mark.parametrize(
    "code",
    ["old(s);", "void old(int n) {", "}", "});", "} else {", "if (n > 0) {", "const std::vector<int> n = old({1, 2});"],
)
def test_a_line_of_code_is_no_prose(code: str):
    assert texts(f"// Before it\n// {code}\n// behind it\n", "cpp") == ["Before it", "behind it"]


@pytest.mark.parametrize("line", ["as in {a, b}", "then to this;", "what reads {", "in all (or none);"])
def test_prose_may_end_like_code(line: str):
    assert texts(f"// It goes on\n// {line}\n", "cpp") == [f"It goes on {line}".removesuffix(" {")]


@pytest.mark.parametrize("heading", ["Keyword Args", "Other Parameters", "Parameters", "Warnings", "References"])
def test_other_headings_of_docstrings(heading: str):
    source = f'"""Does it.\n\n{heading}:\n    alpha: the exponent\n        of all.\n"""\n'
    assert texts(source, "python") == ["Does it.", f"{heading}:", "the exponent of all."]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("benchmarks/results", "docs/results"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_25_words_are_enough(tree: Path, capsys: pytest.CaptureFixture[str]):
    twenty_five = "word " * 24 + "`one of code`."
    (tree / "README.md").write_text(f"{twenty_five}\n")
    assert main(tree) == 0
    (tree / "README.md").write_text(f"Title\n=====\n\nOne.\nOr {twenty_five}\n")
    assert main(tree) == 1
    expected = 'README.md:5: 26 words, "Or word word word word ...": at most 25 words: cut it in two\n'
    assert capsys.readouterr().out == expected


def test_results_of_benchmarks_are_no_prose(tree: Path):
    long = "word " * 26
    (tree / "benchmarks" / "results" / "a.md").write_text(long)
    assert main(tree) == 0
    (tree / "docs" / "results" / "a.md").write_text(long)
    assert main(tree) == 1, "only those"


def test_files_of_every_kind_are_found():
    kinds = {str(path.relative_to(ROOT)): kind for path, kind in files(ROOT)}
    for path in ("README.md", "setup.py", "Makefile", "tests/test_long_sentences.py", "docs/testing.md"):
        assert path in kinds
    # CI's script is in no source distribution.
    bash = {"bash"} if (ROOT / ".ci" / "run").exists() else set()
    assert {"markdown", "python", "make", "cmake", "toml", "cpp"} | bash <= set(kinds.values())
