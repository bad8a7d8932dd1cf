"""The check of `make lint` that no sentence of docs, docstrings, comments and messages has more than 25 words.

Pygments finds comments, and markdown-it finds blocks. Neither recognises a docstring's sections or the end of a
sentence.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment

__all__ = ["Sentence", "main", "sentences"]

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 25

FOLDERS = ("pdl_ext", "csrc", "tests", "benchmarks", "examples", "docs", ".ci", ".github")
# The kind of a file, by its name or its suffix: a name of Pygments'.
KINDS = {
    "Makefile": "make",
    "CMakeLists.txt": "cmake",
    ".clang-format": "yaml",
    "run": "bash",
    "ptx": "cpp",
    ".md": "markdown",
    ".py": "python",
    ".pyi": "python",
    ".toml": "toml",
    ".yml": "yaml",
    ".yaml": "yaml",
    ".sh": "bash",
    **dict.fromkeys((".h", ".cpp", ".cu", ".cuh"), "cpp"),
}

# No HTML, since `vector<float>` in a comment is not HTML.
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")
# Replaces a span of code, which is one word whatever its content.
CODE = "\ue000"
NOT_PROSE = re.compile(
    r"!|\s*(noqa|type:|mypy:|ruff:|fmt:|pragma[: ]\s*no\b|pylint:|clang-format o|NOLINT|SPDX-|Copyright (\(c\)|\d))"
)
SECTION = re.compile(
    r"((Keyword |Other )?(Args|Arguments|Parameters)|Attributes|Cautions?|Examples?|Hints?|Important|Methods|Notes?|"
    r"Raises|References|Returns|See Also|Tips?|Todo|Warnings?|Warns|Yields):"
)
ENTRY = re.compile(r"\*{0,2}[\w.`]+(, \*{0,2}[\w.`]+)*( \([^)]*\))?:(?= |$)")
# A line of commented-out C++ or shell: an assignment, a call, the head of a block, or its end.
CODE_LINE = re.compile(
    r"([\w:<>,*&]+\s+){0,3}[\w:.<>\[\]-]+\s*[-+*/|&]?=[^=].*;"
    r"|([\w:<>,*&]+\s+)?[\w:.<>-]+\(.*\)\s*[;{]"
    r"|(\}\s*)?(if|for|while|switch|else)\b.*\{"
    r"|[})]+[;,]?"
)
# A full stop, closing quotation marks and brackets after it, and the next word.
END = re.compile(r"(?<=\S)[.!?…]+[\"')\]]*(\s+)(?=(\S+))")
# A sentence never ends with e.g. or i.e., and with the others only if a capital follows, as after any word.
ABBREVIATION = re.compile(r"(?:^|[\s(\[\"'])(e\.g|i\.e|vs|cf|fig|figs|eq|sec|al)\.$", re.IGNORECASE)
# A lower-case word continues the sentence; `pdl_ext`, `int32` and `loss.cu` are names, which may begin one.
GOES_ON = re.compile(
    r"(?!(?:git|mypy|numpy|nvcc|ptxas|pyarrow|pytest|ruff|torch)\b)[\"'(\[]*[a-z][a-z'-]*[,;:.!?)\]\"']*$"
)


class Sentence(NamedTuple):
    line: int
    words: tuple[str, ...]


class Text(NamedTuple):
    """Markdown that begins on a line of a file."""

    line: int
    lines: list[str]


def sentences(source: str, kind: str) -> Iterator[Sentence]:
    """The sentences of a file. kind: a value of KINDS."""
    if kind == "markdown":
        yield from sentences_of_markdown(Text(1, source.splitlines()))
        return
    if kind == "python":
        for line, block in messages(source):
            yield from sentences_of_block(line, block, [])
    for text in [*(docstrings(source) if kind == "python" else ()), *comments(source, kind)]:
        if kind != "python":
            text = Text(text.line, ["" if CODE_LINE.fullmatch(line.strip()) else line for line in text.lines])
        if kind != "python" or not is_code(text):
            for chunk in chunks(text):
                yield from sentences_of_markdown(chunk)


def docstrings(source: str) -> Iterator[Text]:
    """Strings that are statements: of modules, classes, functions at any depth, and after attributes."""
    # Statements only: visiting expressions as well takes three times as long.
    remaining: list[ast.AST] = [ast.parse(source)]
    while remaining:
        node = remaining.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first, _, others = node.value.value.partition("\n")
            yield Text(node.lineno, [first.strip(), *textwrap.dedent(others).splitlines()])
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            remaining += getattr(node, block, ())


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of the strings that a user reads: of errors, of warnings, and of the help of a command."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            read = node.exc.args
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            read = [keyword.value for keyword in node.keywords if keyword.arg in ("help", "description", "epilog")]
            read += node.args if name in ("warn", "error", "Finding") else []
        else:
            continue
        for argument in read:
            yield from strings(argument)


def strings(expression: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each string in an expression; a value in an f-string is a word."""
    if isinstance(expression, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "x" for part in expression.values)
        yield expression.lineno, "".join(map(str, parts))
    elif isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        yield expression.lineno, expression.value
    else:
        for child in ast.iter_child_nodes(expression):
            yield from strings(child)


def comments(source: str, kind: str) -> Iterator[Text]:
    """Comments: those on consecutive lines and in one column are one text; one after code begins a new text."""
    lines = source.splitlines()
    text, place = Text(0, []), (0, 0)
    for line, column, comment in python_comments(source) if kind == "python" else other_comments(source, kind):
        if comment.startswith("/*"):
            yield Text(line, [re.sub(r"^\s*\*? ?", "", part) for part in comment[2:-2].splitlines()])
            continue
        content = re.sub(r"^(//[/!]*<?|#+:?)", "", comment.rstrip())
        if NOT_PROSE.match(content):
            continue
        if not text.lines or place != (line, column) or lines[line - 1][:column].strip("\t @"):
            if text.lines:
                yield text
            text = Text(line, [])
        text.lines.append(content.removeprefix(" "))
        place = (line + 1, column)
    if text.lines:
        yield text


def python_comments(source: str) -> Iterator[tuple[int, int, str]]:
    """Line, column and text. By the standard library, which takes a third of Pygments' time."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield (*token.start, token.string)


def other_comments(source: str, kind: str) -> Iterator[tuple[int, int, str]]:
    line, end = 1, 0
    for start, token, value in get_lexer_by_name(kind).get_tokens_unprocessed(source):
        if token in Comment and token not in Comment.Preproc and token not in Comment.PreprocFile:
            # A comment in a recipe has the tab and the @ before it.
            before = value.find("#") if kind == "make" else 0
            start, value = start + before, value[before:]
            line, end = line + source.count("\n", end, start), start
            yield line, start - source.rfind("\n", 0, start) - 1, value


def is_code(text: Text) -> bool:
    """Whether it is Python that was commented out."""
    whole = "\n".join(text.lines).strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            statements = ast.parse(textwrap.dedent(whole)).body
    except SyntaxError:
        return False
    return not all(isinstance(statement, ast.Expr) for statement in statements)


def chunks(text: Text) -> Iterator[Text]:
    """Parts of a docstring or a comment that Markdown would join.

    A deeper line after a colon begins a part, and so does each entry of a section such as Args, after its name.
    """
    chunk, section = Text(text.line, []), -1
    previous = ""
    for number, line in enumerate(text.lines, text.line):
        depth = len(line) - len(line.lstrip())
        begins = False
        if line.strip() and 0 <= depth < section:
            begins, section = True, -1
        if previous.endswith(":") and depth > len(previous) - len(previous.lstrip()):
            begins = True
            if SECTION.fullmatch(previous.strip()):
                section = depth
        if section >= 0:
            entry = ENTRY.match(line.strip()) if depth == section else None
            begins = begins or entry is not None
            line = line.strip()[entry.end() if entry else 0 :].strip()
        if begins:
            yield chunk
            chunk = Text(number, [])
        chunk.lines.append(line)
        previous = text.lines[number - text.line].rstrip()
    yield chunk


def sentences_of_markdown(text: Text) -> Iterator[Sentence]:
    line = text.line
    for token in MARKDOWN.parse("\n".join(text.lines)):
        if token.map:
            line = text.line + token.map[0]
        if token.type == "inline":
            block, codes = "", []
            for part in token.children or ():
                if part.type == "code_inline":
                    codes.append(" ".join(part.content.split()))
                    block += CODE
                elif part.type in ("softbreak", "hardbreak"):
                    block += "\n"
                else:
                    block += part.content
            yield from sentences_of_block(line, block, codes)


def sentences_of_block(line: int, block: str, codes: list[str]) -> Iterator[Sentence]:
    start, remaining = 0, iter(codes)
    for end in [*(match.end() for match in END.finditer(block) if is_end(block, match)), len(block)]:
        # Only a part with a letter or a digit is a word; a span of code is one by itself.
        parts = [part for part in block[start:end].split() if re.search(rf"[^\W_]|{CODE}", part)]
        words = tuple(re.sub(CODE, lambda _: next(remaining), part) for part in parts)
        indent = len(block[start:end]) - len(block[start:end].lstrip())
        if words:
            yield Sentence(line + block.count("\n", 0, start + indent), words)
        start = end


def is_end(block: str, stop: re.Match[str]) -> bool:
    return not ABBREVIATION.search(block[: stop.start(1)]) and not GOES_ON.match(stop[2])


def files(root: Path) -> Iterator[tuple[Path, str]]:
    """The checked files with their kinds, without the results that benchmarks write."""
    paths = [*sorted(root.iterdir()), *(path for folder in FOLDERS for path in sorted((root / folder).rglob("*")))]
    for path in paths:
        kind = KINDS.get(path.name) or KINDS.get(path.suffix)
        if kind and path.is_file() and root / "benchmarks" / "results" not in path.parents:
            yield path, kind


def main(root: Path = ROOT) -> int:
    """Prints the sentences that are too long; the exit code."""
    errors = [
        f"{file.relative_to(root)}:{sentence.line}: {len(sentence.words)} words, "
        f'"{" ".join(sentence.words[:5])} ...": at most {LIMIT} words: cut it in two'
        for file, kind in files(root)
        for sentence in sentences(file.read_text(encoding="utf-8"), kind)
        if len(sentence.words) > LIMIT
    ]
    print(*errors, sep="\n", end="\n" if errors else "")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
