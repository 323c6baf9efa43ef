"""Relative links in the documents lead to files that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)")


def dead_links(document: Path) -> list[str]:
    """Targets of relative links in ``document`` that do not exist."""
    return [
        target
        for target in LINK.findall(document.read_text("utf-8"))
        if not (document.parent / target).exists()
    ]


def main() -> int:
    """Print dead links; exit status 1 when there is one."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    dead = [
        f"{document.relative_to(ROOT)}: {target}" for document in documents for target in dead_links(document)
    ]
    print(
        "\n".join(dead) or f"links: {len(documents)} documents, none is dead",
        file=sys.stderr if dead else sys.stdout,
    )
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
