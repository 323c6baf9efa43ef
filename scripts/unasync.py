"""Make the blocking face from the asynchronous source.

``python/casemate/_async`` and ``tests/**/_async`` are the source; their twins ``_sync`` are written token by token: ``async`` and
``await`` fall away and the names below are replaced. ``--check`` writes nothing and fails when a twin differs.
"""

from __future__ import annotations

import sys
import tokenize
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREES = [
    (ROOT / "python" / "casemate" / "_async", ROOT / "python" / "casemate" / "_sync"),
    (ROOT / "tests" / "e2e" / "_async", ROOT / "tests" / "e2e" / "_sync"),
]
HEAD = "# Made by scripts/unasync.py from {source}; do not edit.\n"
NAMES = {
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
    "_async": "_sync",
    "aclose": "close",
    "aio": "blocking",
    "AsyncIterator": "Iterator",
    "StopAsyncIteration": "StopIteration",
}


def name_of(token: str) -> str:
    """The blocking name for a name of the source."""
    if token in NAMES:
        return NAMES[token]
    if token.startswith("Async") and token[5:6].isupper():
        return token[5:]
    if token.startswith("_Async") and token[6:7].isupper():
        return "_" + token[6:]
    if token.startswith("async_"):
        return token[6:]
    return token


def text_of(token: str) -> str:
    """A string or comment with the names in it replaced."""
    for source, twin in (
        ("casemate._async", "casemate._sync"),
        ("await ", ""),
        ("async with ", "with "),
        ("async for ", "for "),
    ):
        token = token.replace(source, twin)
    words: list[str] = []
    word = ""
    for character in token + "\0":
        if character.isalnum() or character == "_":
            word += character
            continue
        words.append(name_of(word) if word else "")
        words.append(character)
        word = ""
    return "".join(words)[:-1]


def tokens(source: str) -> Iterator[tuple[int, str, tuple[int, int], tuple[int, int]]]:
    """Tokens of the twin with the positions of the source."""
    skip_space_before = False
    for token in tokenize.generate_tokens(StringIO(source).readline):
        kind, text, start, end = token.type, token.string, token.start, token.end
        if kind == tokenize.NAME and text in ("async", "await"):
            skip_space_before = True
            yield -1, "", start, end
            continue
        if kind == tokenize.NAME:
            text = name_of(text)
        elif kind in (tokenize.STRING, tokenize.COMMENT):
            text = text_of(text)
        yield (-2 if skip_space_before else kind), text, start, end
        skip_space_before = False


def blocking_twin(source: str) -> str:
    """The blocking twin of a module's text."""
    lines = source.splitlines(keepends=True)
    out: list[str] = []
    at = (1, 0)
    for kind, text, start, end in tokens(source):
        if kind != -2:
            out.append(_between(lines, at, start))
        out.append(text)
        at = end
    return "".join(out)


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]] if start[0] <= len(lines) else ""
    parts = [lines[start[0] - 1][start[1] :]]
    parts += lines[start[0] : end[0] - 1]
    if end[0] <= len(lines):
        parts.append(lines[end[0] - 1][: end[1]])
    return "".join(parts)


def main(arguments: list[str]) -> int:
    """Write the twins, or with ``--check`` name those that differ."""
    check = "--check" in arguments
    faults = 0
    for source_tree, twin_tree in TREES:
        wanted: dict[Path, str] = {}
        for source in sorted(source_tree.rglob("*.py")):
            relative = source.relative_to(source_tree)
            head = HEAD.format(source=source.relative_to(ROOT))
            wanted[twin_tree / relative] = head + blocking_twin(source.read_text("utf-8"))
        present = set(twin_tree.rglob("*.py")) if twin_tree.is_dir() else set()
        for path in sorted(present - set(wanted)):
            faults += 1
            if check:
                print(f"{path.relative_to(ROOT)}: has no source", file=sys.stderr)
            else:
                path.unlink()
        for path, text in wanted.items():
            if path in present and path.read_text("utf-8") == text:
                continue
            faults += 1
            if check:
                print(
                    f"{path.relative_to(ROOT)}: differs from its source; run scripts/unasync.py",
                    file=sys.stderr,
                )
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, "utf-8")
    return 1 if check and faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
