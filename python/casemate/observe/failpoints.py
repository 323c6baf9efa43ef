"""Points at which a start or an end can be made to fail, so that what is undone can be tested. Off unless asked for.

A setting is ``name=term->term…``, several are separated by ``;``. A term is an action, with ``N*`` before it for N hits; one
without a count holds for ever, and behind the last counted one nothing happens any more. Actions:

``off``
    Nothing.
``error(text)``
    Raises the point's class of error, with ``text`` if one is given.
``delay(ms)``
    Waits in the calling thread; under an event loop the loop stands still.
``cancel``
    Raises what a wait at this point ends with when it is interrupted: in a task CancelledError, elsewhere KeyboardInterrupt.
``kill``
    Ends this process by SIGKILL.

Points whose names begin with ``native.`` lie in the native parts: their scripts are read here and handed over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from casemate.errors import (
    AgentConnectionError,
    CasemateError,
    HostError,
    HypervisorError,
    InvalidConfigError,
)

__all__ = ["POINTS", "arm_from_settings", "armed", "calling", "hit", "interruption"]

VARIABLE = "CASEMATE_FAILPOINTS"

# Steps of plans: each has a second point, `….after`, behind it.
_STEPS: dict[str, type[CasemateError]] = {
    "qemu.blockdev_add": HypervisorError,
    "qemu.device_add": HypervisorError,
    "qemu.device_del": HypervisorError,
    "qemu.blockdev_del": HypervisorError,
    "qemu.getfd": HypervisorError,
    "qemu.netdev_add": HypervisorError,
    "qemu.netdev_del": HypervisorError,
    "tap.create": HostError,
    "tap.hand_over": HostError,
    "guest.there": AgentConnectionError,
    "guest.gone": AgentConnectionError,
}
# Nothing is undone behind them.
_LAST = ("qemu.blockdev_del", "qemu.netdev_del")

POINTS: dict[str, type[CasemateError]] = {
    "store.lock": HostError,
    "store.clear": HostError,
    "store.write": HostError,
    "store.rename": HostError,
    "store.remove": HostError,
    "qemu.qmp_socket": HostError,
    "qemu.qmp_connect": HostError,
    "qemu.vsock": HostError,
    "qemu.vsock_backend": HostError,
    "qemu.spawn": HostError,
    "qemu.spawned": HostError,
    "qemu.quit": HypervisorError,
    "qemu.killed": HypervisorError,
    "qemu.close": HostError,
    "keeper.spawn": HostError,
    "keeper.recorded": HostError,
    "keeper.request": HostError,
    "keeper.keep": HostError,
    "keeper.commit": HostError,
    "keeper.committed": HostError,
    "sandbox.planned": HostError,
    "sandbox.listen": HostError,
    "sandbox.connect": AgentConnectionError,
    "agent.create_sandbox.before": AgentConnectionError,
    "agent.create_sandbox.after": AgentConnectionError,
    "agent.create_container.before": AgentConnectionError,
    "agent.create_container.after": AgentConnectionError,
    "agent.start_container.before": AgentConnectionError,
    "agent.start_container.after": AgentConnectionError,
    "agent.exec.before": AgentConnectionError,
    "agent.exec.after": AgentConnectionError,
    "agent.read": AgentConnectionError,
    "agent.write_stdin": AgentConnectionError,
    "agent.close_stdin": AgentConnectionError,
    "agent.wait_process": AgentConnectionError,
    "agent.signal": AgentConnectionError,
    "agent.resize": AgentConnectionError,
    "agent.pause_container": AgentConnectionError,
    "agent.resume_container": AgentConnectionError,
    "agent.remove_container.before": AgentConnectionError,
    "agent.remove_container.after": AgentConnectionError,
    "agent.destroy_sandbox": AgentConnectionError,
    "agent.close": AgentConnectionError,
    "image.download": HostError,
    "image.work": HostError,
    "image.unpack": HostError,
    "image.pack": HostError,
    "image.record": HostError,
    "image.rename": HostError,
    "image.renamed": HostError,
    "image.names": HostError,
    "image.named": HostError,
    "image.parts": HostError,
    "image.remove": HostError,
    "image.removed": HostError,
    "native.spawn": HostError,
    "native.connect": AgentConnectionError,
    "native.accept": AgentConnectionError,
    "native.send": AgentConnectionError,
    "native.recv": AgentConnectionError,
    "native.unpack": HostError,
    "native.unpack_write": HostError,
    **_STEPS,
    **{f"{name}.after": kind for name, kind in _STEPS.items() if name not in _LAST},
}
"""Each point, and the error that its step may end with."""

NATIVE = "native."

Action = Callable[[], None]

Term = tuple[int | None, str, str]
"""How many hits (None: all that follow), the action's name, its argument."""


class _Script:
    """What one point does, hit by hit. Each term: how many hits are left to it (None: all), and its action."""

    __slots__ = ("_lock", "_terms", "hits")

    def __init__(self, terms: list[tuple[int | None, Action]]) -> None:
        self._terms = terms
        self._lock = threading.Lock()
        self.hits = 0

    def run(self) -> None:
        action = self._next()
        if action is not None:
            action()

    def _next(self) -> Action | None:
        with self._lock:
            self.hits += 1
            while self._terms:
                left, action = self._terms[0]
                if left is None:
                    return action
                if left > 0:
                    self._terms[0] = (left - 1, action)
                    return action
                del self._terms[0]
        return None


# What is set in this process: read at every point, so it is one dictionary, empty in normal use. Native scripts are of
# ``_core.FailpointScript``, which is imported when one is made.
_scripts: dict[str, Any] = {}
_settled = ""


def hit(name: str) -> None:
    """Do what is set for the point ``name``. Does not block unless told to."""
    if _scripts and (script := _scripts.get(name)) is not None:
        script.run()


def arm_from_settings(text: str) -> None:
    """Set what the environment asks for, once in a process.

    Raises:
        InvalidConfigError: As :func:`armed`.
    """
    global _settled
    if text != _settled:
        _set(_scripts | _parse(text))
        _settled = text


@contextlib.contextmanager
def armed(text: str) -> Iterator[Callable[[str], int]]:
    """Set points for a while. Gives a function that counts the hits of one of them.

    Raises:
        InvalidConfigError: An unknown name or a term that can't be read; the text has what is known.
    """
    with _put(_parse(text)) as count:
        yield count


@contextlib.contextmanager
def calling(name: str, function: Action, *, after: int = 0) -> Iterator[Callable[[str], int]]:
    """Call ``function`` at one hit of a point, the one behind the first ``after``; not of a native one. Raises: InvalidConfigError."""
    _check_name(name)
    if name.startswith(NATIVE):
        raise InvalidConfigError(f"{name} is a native point: no function can be called there", path=VARIABLE)
    with _put({name: _Script([(after, _nothing), (1, function)])}) as count:
        yield count


@contextlib.contextmanager
def _put(scripts: dict[str, Any]) -> Iterator[Callable[[str], int]]:
    before = dict(_scripts)
    _set(before | scripts)
    try:
        yield lambda name: int(scripts[name].hits)
    finally:
        _set(before)


def _set(scripts: dict[str, Any]) -> None:
    native = {name: script for name, script in scripts.items() if name.startswith(NATIVE)}
    if native or any(name.startswith(NATIVE) for name in _scripts):
        from casemate import _core

        _core.set_failpoints(native)
    _scripts.clear()
    _scripts.update(scripts)


def _parse(text: str) -> dict[str, Any]:
    scripts = {}
    for setting in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, terms = setting.partition("=")
        name = name.strip()
        _check_name(name)
        if not equals:
            raise _unreadable(setting, "'=' and an action behind the name are expected")
        scripts[name] = _script(name, [_term(name, term.strip()) for term in terms.split("->")])
    return scripts


def _script(name: str, terms: list[Term]) -> Any:
    if name.startswith(NATIVE):
        from casemate import _core

        return _core.FailpointScript(terms)
    return _Script([(count, _action(name, verb, argument)) for count, verb, argument in terms])


def _check_name(name: str) -> None:
    if name not in POINTS:
        raise InvalidConfigError(
            f"there is no failpoint {name!r}; there are: {', '.join(sorted(POINTS))}", path=VARIABLE
        )


def _term(name: str, text: str) -> Term:
    count, star, action = text.partition("*")
    # A star may also stand in an error's text.
    if not star or not count.strip().isdecimal():
        return None, *_verb(name, text)
    return int(count), *_verb(name, action.strip())


def _verb(name: str, text: str) -> tuple[str, str]:
    """An action's name and argument, checked."""
    verb, bracket, argument = text.partition("(")
    if bracket and not argument.endswith(")"):
        raise _unreadable(text, "the bracket is not closed")
    argument = argument[:-1]
    if verb == "error":
        return verb, argument or f"failpoint {name}"
    if verb == "delay":
        if not argument.isdecimal():
            raise _unreadable(text, "delay(MILLISECONDS) is expected")
        return verb, argument
    if bracket or verb not in ("off", "cancel", "kill"):
        raise _unreadable(text, "off, error(TEXT), delay(MILLISECONDS), cancel or kill is expected")
    if (name, verb) == ("native.recv", "cancel"):
        raise _unreadable(
            text, "off, error, delay or kill is expected: a read on an event loop is nobody's wait"
        )
    return verb, ""


def _action(name: str, verb: str, argument: str) -> Action:
    if verb == "error":
        return lambda: _fail(name, argument)
    if verb == "delay":
        return lambda: time.sleep(int(argument) / 1000)
    return {"off": _nothing, "cancel": _cancel, "kill": _kill}[verb]


def _unreadable(text: str, expected: str) -> InvalidConfigError:
    return InvalidConfigError(f"{text!r} in failpoints can't be read: {expected}", path=VARIABLE)


def _nothing() -> None:
    """The action ``off``."""


def _fail(name: str, text: str) -> None:
    raise POINTS[name](text, op=name)


def _cancel() -> None:
    raise interruption()


def interruption() -> BaseException:
    """What a wait in this place ends with when it is interrupted. Also called by the native parts."""
    # A task can only be there when asyncio was imported; importing it here would cost more than all points.
    asyncio = sys.modules.get("asyncio")
    try:
        task = asyncio.current_task() if asyncio is not None else None
    except RuntimeError:  # no loop runs in this thread
        task = None
    if asyncio is None or task is None:
        return KeyboardInterrupt()
    cancelled: BaseException = asyncio.CancelledError()
    return cancelled


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
