"""Docstrings and signatures as the site shows them, where the sources are written for a reader of code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Function, Module, Object, Parameter, ParameterKind, Parameters

# Sentences that follow each other in the sources, each of which begins a paragraph here.
LEAD = re.compile(r"(?:^|(?<=\. ))(Returns|Raises|Source:)(?= )", re.MULTILINE)
# An argument that is told in prose.
ARGUMENT = re.compile(r"^([a-z_]+(?:, [a-z_]+)*): (?=\S)", re.MULTILINE)
SECTION = re.compile(r"^Args:\n((?:    .*\n?|\n(?=    ))+)", re.MULTILINE)
ENTRY = re.compile(r"^    (\S[^:]*): ((?:.*\n?)(?:^     .*\n?)*)", re.MULTILINE)
NAMES = re.compile(r"\w+(, \w+)*")


class Docstrings(Extension):
    """Loaded by mkdocstrings, by the name of this file."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Writes docstrings anew, and puts the options of a loss where `**options` stands for them, as help() does."""
        _rewrite(pkg)
        fields = [field for field in pkg["options.LossOptions"].attributes.values() if field.value is not None]
        options = [
            Parameter(field.name, annotation=field.annotation, kind=ParameterKind.keyword_only, default=field.value)
            for field in fields
        ]
        for module in ("functional", "loss", "reference"):
            for function in _functions(pkg[module]):
                last = list(function.parameters)[-1:]
                if last and "LossKeywords" in str(last[0].annotation):
                    function.parameters = Parameters(*list(function.parameters)[:-1], *options)


def _rewrite(obj: Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = as_markdown(obj.docstring.value, _arguments(obj))
    for member in obj.members.values():
        if not member.is_alias and not member.is_attribute:
            _rewrite(member)


def _arguments(obj: Object) -> set[str]:
    """The names that a docstring may tell in prose."""
    if obj.is_class and "__init__" in obj.members:
        obj = obj.members["__init__"]
    return {parameter.name.lstrip("*") for parameter in obj.parameters} if obj.is_function else set()


def _functions(owner: Object) -> list[Function]:
    found = list(owner.functions.values())
    for of_module in owner.classes.values():
        if not of_module.is_alias:
            found += of_module.functions.values()
    return [function for function in found if not function.is_alias]


def as_markdown(text: str, arguments: set[str]) -> str:
    """A docstring in which each of these sentences is a paragraph, and each argument of a section has its entry."""
    parts, end = [], 0
    for section in SECTION.finditer(text):
        parts += [_paragraphs(text[end : section.start()], arguments), _entries(section[1])]
        end = section.end()
    return "".join([*parts, _paragraphs(text[end:], arguments)])


def _paragraphs(text: str, arguments: set[str]) -> str:
    def marked(told: re.Match[str]) -> str:
        names = told[1].split(", ")
        # A line of a sentence may begin with a word and a colon as well.
        return f"\n{', '.join(f'`{name}`' for name in names)}: " if arguments.issuperset(names) else told[0]

    return ARGUMENT.sub(marked, LEAD.sub(r"\n\n**\1**", text))


def _entries(section: str) -> str:
    """The section with an entry for each of `a, b: text`, and what is no name behind it."""
    named, others = "Args:\n", ""
    for names, told in ENTRY.findall(section):
        if NAMES.fullmatch(names):
            named += "".join(f"    {name}: {told.rstrip()}\n" for name in names.split(", "))
        else:
            others += f"\n{names}: {' '.join(told.split())}\n"
    return f"{named}{others}\n"
