"""The script that makes the blocking face."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("unasync", ROOT / "scripts" / "unasync.py")
assert _spec is not None and _spec.loader is not None
unasync = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(unasync)


@pytest.mark.parametrize(
    ("source", "twin"),
    [
        ("async def f():\n    await g()\n", "def f():\n    g()\n"),
        ("x = [await y for y in z]\n", "x = [y for y in z]\n"),
        ("async with a as b:\n    pass\n", "with a as b:\n    pass\n"),
        ("async for x in y:\n    pass\n", "for x in y:\n    pass\n"),
        (
            "class AsyncSandbox:\n    async def aclose(self): ...\n",
            "class Sandbox:\n    def close(self): ...\n",
        ),
        ("from casemate._compat import aio as compat\n", "from casemate._compat import blocking as compat\n"),
        ("from casemate._async.run import async_run\n", "from casemate._sync.run import run\n"),
        ('"""See :meth:`AsyncSandbox.aclose`."""\n', '"""See :meth:`Sandbox.close`."""\n'),
        ("async def __aenter__(self): ...\n", "def __enter__(self): ...\n"),
        ("asyncio_free = 1\n", "asyncio_free = 1\n"),
        ('text = "asynchronous and awaited"\n', 'text = "asynchronous and awaited"\n'),
    ],
)
def test_blocking_twin_then_waiting_words_are_gone(source: str, twin: str) -> None:
    assert unasync.blocking_twin(source) == twin


def test_main_when_checking_this_tree_then_twins_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert unasync.main(["--check"]) == 0, capsys.readouterr().err
