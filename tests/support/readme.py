"""Examples in a Markdown document: what to run and what it shall print."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Example", "matches", "read_examples"]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ("python", "sh")


class Example(NamedTuple):
    """A fenced block, its language, the line it starts at, and the output given in the ``text`` block after it."""

    language: str
    code: str
    line: int
    output: str | None


def read_examples(document: str) -> list[Example]:
    """The ``python`` and ``sh`` blocks of a document, in order. A ``text`` block next to one is its output."""
    blocks = [
        (match[1], match[2], document.count("\n", 0, match.start()) + 1, match.span())
        for match in FENCE.finditer(document)
    ]
    examples = []
    for number, (language, code, line, (_, end)) in enumerate(blocks):
        if language not in RUN:
            continue
        output = None
        if number + 1 < len(blocks):
            following, text, _, (start, _) = blocks[number + 1]
            if following == "text" and not document[end:start].strip():
                output = text
        examples.append(Example(language, code, line, output))
    return examples


def matches(wanted: str, got: str) -> bool:
    """Whether ``got`` is ``wanted``, where ``…`` stands for anything within a line."""
    pattern = "[^\n]*".join(map(re.escape, wanted.split("…")))
    return re.fullmatch(pattern, got) is not None
