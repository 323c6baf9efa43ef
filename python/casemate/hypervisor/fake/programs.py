"""Processes of the fake guest: a few programs that every image seems to have, and a shell that knows no more than they."""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import Callable

__all__ = ["CannotExecute", "Process"]

SIGKILL, SIGTERM = 9, 15
_IGNORED_SIGNALS = (0, 17, 18, 23, 28)
PANIC = "echo c > /proc/sysrq-trigger"

Answer = Callable[[bytes], None]


class CannotExecute(Exception):
    """There is no such program, or it can't be executed; the text is the agent's."""


class Output:
    """What a process wrote and nobody has read yet, and who waits for it."""

    __slots__ = ("_held", "_readers", "ended")

    def __init__(self) -> None:
        self._held = bytearray()
        self._readers: deque[tuple[int, Answer]] = deque()
        self.ended = False

    def read(self, max_bytes: int, answer: Answer) -> None:
        """Answer as soon as there is something; with nothing at the end."""
        self._readers.append((max_bytes, answer))
        self._serve()

    def write(self, data: bytes) -> None:
        """The process writes."""
        self._held += data
        self._serve()

    def end(self) -> None:
        """The process closed it."""
        self.ended = True
        self._serve()

    def _serve(self) -> None:
        while self._readers and (self._held or self.ended):
            max_bytes, answer = self._readers.popleft()
            piece = bytes(self._held[:max_bytes])
            del self._held[: len(piece)]
            answer(piece)


class Process:
    """One process. ``after`` runs a function some seconds later; ``panic`` is what the guest does at a sysrq.

    Raises:
        CannotExecute: There is no such program.
    """

    def __init__(
        self,
        args: tuple[str, ...],
        *,
        env: tuple[str, ...],
        cwd: str,
        hostname: str,
        terminal: bool,
        after: Callable[[float, Callable[[], None]], None],
        panic: Callable[[], None],
    ) -> None:
        self.args = args
        self.stdout, self.stderr = Output(), Output()
        self.status: int | None = None
        self.frozen = False
        self.terminal = terminal
        self.size = (0, 0)
        self._after = after
        self._panic = panic
        self._facts = {"env": "\n".join(env), "pwd": cwd, "hostname": hostname}
        self._input: deque[tuple[bytes, Callable[[int], None]]] = deque()
        self._input_closed = False
        self._on_input: Callable[[bytes], None] | None = None
        self._on_input_end: Callable[[], None] = lambda: self.end(0)
        self._waiters: list[Callable[[int], None]] = []
        self._words = self._resolve(args)

    def start(self) -> None:
        """Run."""
        self._run(self._words)
        self._take_input()

    def write(self, data: bytes, answer: Callable[[int], None]) -> bool:
        """Its input; answered when it was read. False when nobody will ever read it."""
        if self._input_closed or self.status is not None:
            return False
        self._input.append((data, answer))
        self._take_input()
        return True

    def close_input(self) -> None:
        """End of its input, behind what was written."""
        self._input_closed = True
        self._take_input()

    def wait(self, answer: Callable[[int], None]) -> None:
        """Answer when it has ended."""
        if self.status is None:
            self._waiters.append(answer)
        else:
            answer(self.status)

    def signal(self, number: int) -> None:
        """A signal; all that are not ignored end it."""
        if number not in _IGNORED_SIGNALS:
            self.end(128 + number)

    def thaw(self) -> None:
        """Go on with what came while it was frozen."""
        self.frozen = False
        self._take_input()

    def end(self, status: int) -> None:
        """It is over."""
        if self.status is not None:
            return
        self.status = status
        self.stdout.end()
        self.stderr.end()
        for _, answer in self._input:
            answer(0)
        self._input.clear()
        for answer in self._waiters:
            answer(status)

    def _resolve(self, args: tuple[str, ...]) -> tuple[str, ...]:
        name = args[0].rpartition("/")[2] if args else ""
        if args and args[0] == "/etc/passwd":
            raise CannotExecute("exec /etc/passwd: EACCES: Permission denied")
        if not hasattr(self, f"_program_{name}"):
            raise CannotExecute(f"exec {args[0] if args else ''}: ENOENT: No such file or directory")
        return (name, *args[1:])

    def _run(self, words: tuple[str, ...]) -> None:
        program: Callable[..., None] = getattr(self, f"_program_{words[0]}")
        program(*words[1:])

    def _take_input(self) -> None:
        while self._on_input and self._input and not self.frozen and self.status is None:
            data, answer = self._input.popleft()
            self._on_input(data)
            answer(len(data))
        if self._on_input and self._input_closed and not self._input and not self.frozen:
            self._on_input_end()

    def _say(self, text: str) -> None:
        self.stdout.write(text.encode() + b"\n")

    def _program_true(self, *_: str) -> None:
        self.end(0)

    def _program_false(self, *_: str) -> None:
        self.end(1)

    def _program_echo(self, *words: str) -> None:
        self._say(" ".join(words))
        self.end(0)

    def _program_env(self, *_: str) -> None:
        self._fact("env")

    def _program_pwd(self, *_: str) -> None:
        self._fact("pwd")

    def _program_hostname(self, *_: str) -> None:
        self._fact("hostname")

    def _fact(self, name: str) -> None:
        self._say(self._facts[name])
        self.end(0)

    def _program_cat(self, *_: str) -> None:
        self._on_input = self.stdout.write

    def _program_sleep(self, seconds: str = "0", *_: str) -> None:
        self._after(float(seconds), lambda: self.end(0))

    def _program_stty(self, *_: str) -> None:
        self._say(f"{self.size[0]} {self.size[1]}")
        self.end(0)

    def _program_sh(self, option: str = "", script: str = "", *_: str) -> None:
        if script == PANIC:
            self._panic()
            return
        status = 0
        for step in script.split(";") if option == "-c" else ():
            words = tuple(shlex.split(step))
            to_stderr = words[-1:] == (">&2",)
            if words[:1] == ("exit",):
                status = int(words[1])
                break
            if words[:1] == ("echo",):
                text = " ".join(words[1:-1] if to_stderr else words[1:])
                (self.stderr if to_stderr else self.stdout).write(text.encode() + b"\n")
                continue
            # The last word of the shell: it becomes that program.
            self._run(self._resolve(words[1:] if words[:1] == ("exec",) else words))
            return
        self.end(status)
