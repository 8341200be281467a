"""Docstrings are plain text: characters with a meaning in Markdown are escaped.

The paragraphs that all docstrings of softjax have (CONTRIBUTING.md) begin in bold.
"""

import re
from collections.abc import Iterator

import griffe

SPECIAL = {ord(character): f"&#{ord(character)};" for character in "<>*_[]$&"}
LABEL = re.compile(r"^([A-Z][\w ]{2,40}?): ")
SOURCE = re.compile(r"^Source: .*(?:\n    .*)*", re.MULTILINE)


class PlainText(griffe.Extension):
    """Turns every docstring into sections of Markdown."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        """Visits the names that the package defines; aliases have the same docstrings."""
        for docstring in _docstrings(pkg):
            text = docstring.value.replace("\nExample:\n", "\nExamples:\n")
            # Without its indentation, the source is a paragraph instead of a section.
            docstring.value = SOURCE.sub(lambda m: re.sub(r"\n +", "\n", m[0]), text)
            for section in docstring.parsed:
                _escape_section(section)


def _docstrings(obj: griffe.Object) -> Iterator[griffe.Docstring]:
    if obj.docstring is not None:
        yield obj.docstring
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            yield from _docstrings(member)


def _escape_section(section: griffe.DocstringSection) -> None:
    if isinstance(section, griffe.DocstringSectionText):
        section.value = markdown(section.value)
    elif isinstance(section, griffe.DocstringSectionExamples):
        kinds = griffe.DocstringSectionKind
        section.value = [
            (kind, text if kind is kinds.examples else markdown(text))
            for kind, text in section.value
        ]
    elif isinstance(section.value, list):
        for item in section.value:
            item.description = markdown(item.description)


def markdown(text: str) -> str:
    """Plain text as Markdown that shows it unchanged; indented lines stay code."""
    first, *others = text.splitlines() or [""]
    lines = [_escaped(first) if not first.startswith("Source: ") else _labelled(first)]
    for line in others:
        if line.startswith("    "):
            lines.append(line)
        elif LABEL.match(line):
            lines += ["", _labelled(line)]
        else:
            lines.append(_escaped(line))
    return "\n".join(lines)


def _labelled(line: str) -> str:
    label, _, rest = line.partition(": ")
    return f"**{label}:** {_escaped(rest)}"


def _escaped(line: str) -> str:
    """The text with everything escaped except the parts between backticks."""
    parts = line.split("`")
    if len(parts) % 2 == 0:
        return line.translate(SPECIAL)
    return "`".join(p if n % 2 else p.translate(SPECIAL) for n, p in enumerate(parts))
