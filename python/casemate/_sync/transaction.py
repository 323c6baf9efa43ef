# Made by scripts/unasync.py from python/casemate/_async/transaction.py; do not edit.
"""Carries plans out: step by step, checked at the end, undone in reverse when anything fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from casemate._sync.undo import raise_with
from casemate._compat import blocking as compat
from casemate.errors import (
    AgentConnectionError,
    AgentRpcError,
    HostError,
    InvalidConfigError,
    InvalidStateError,
    QmpError,
    UnsupportedError,
    VmmExitedError,
)
from casemate.observe import failpoints
from casemate.observe.log import Log
from casemate.transaction import Action, NativeCall, Plan, PlanState, QmpCall, Step

__all__ = ["Transaction", "Performer"]

_log = Log(__name__)

Performer = Callable[[Any, Mapping[str, Any], float], compat.Later[Any]]
"""Performs one kind of action: the action, results of earlier steps by name, seconds it may take."""

# Who raises one of these has changed nothing. After any other error the step may have happened.
_REFUSALS = (QmpError, AgentRpcError, HostError, InvalidConfigError, InvalidStateError, UnsupportedError)


class Transaction:
    """One plan on its way.

    Args:
        plan: What is to be done.
        performers: For each kind of action in it, who performs it.

    Attributes:
        state: How far it came.
        results: What each step gave, by its name; what the last part of its undo gave, by ``name.undo``.
        remains: The steps that could not be undone.
    """

    __slots__ = ("_done", "_performers", "plan", "remains", "results", "state")

    def __init__(self, plan: Plan, performers: Mapping[type[Action], Performer]) -> None:
        self.plan = plan
        self.state = PlanState.PLANNED
        self.results: dict[str, Any] = {}
        self.remains: tuple[Step, ...] = ()
        self._performers = performers
        self._done: list[Step] = []

    def run(self) -> Mapping[str, Any]:
        """Do the steps in order; return what each gave.

        Raises:
            InvalidStateError: It ran before.
            Exception: What the first failed step raised, when everything was undone.
            BaseExceptionGroup: That, then what failed while undoing; the first has a note of what remains.
        Blocks: for the steps, each at most ``limit_s``, and for their undoing. A cancellation is raised when all is undone.
        """
        if self.state is not PlanState.PLANNED:
            raise InvalidStateError(
                f"{self.plan.name} ran before", state=self.state.value, wanted=PlanState.PLANNED.value
            )
        started_ns = time.perf_counter_ns()
        steps_ms = {}
        try:
            for step in self.plan.steps:
                step_ns = time.perf_counter_ns()
                self._do(step)
                steps_ms[step.name] = (time.perf_counter_ns() - step_ns) / 1e6
        except BaseException as error:
            failures = compat.shielded(self._undo(error))
            cause = raise_with(error, failures)
            if cause is error:
                raise
            raise cause from error
        has_checks = any(step.check for step in self.plan.steps)
        self.state = PlanState.VERIFIED if has_checks else PlanState.APPLIED
        _log.debug(
            "plan done",
            extra={
                "op": self.plan.name,
                "state": self.state.value,
                "duration_ms": (time.perf_counter_ns() - started_ns) / 1e6,
                "steps_ms": steps_ms,
            },
        )
        return self.results

    def _do(self, step: Step) -> None:
        failpoints.hit(step.name)
        try:
            self.results[step.name] = self._perform(step.action, step.limit_s)
        except _REFUSALS:
            raise
        except BaseException:
            self._done.append(step)
            raise
        if not step.final:
            self._done.append(step)
            failpoints.hit(f"{step.name}.after")

    def _undo(self, cause: BaseException) -> list[BaseException]:
        """Undo what was done or may have been, last first, and go on after failures; return these."""
        failures: list[BaseException] = []
        remains: list[Step] = []
        for step in reversed(self._done):
            try:
                for action in step.undo:
                    self.results[f"{step.name}.undo"] = self._perform_undo(
                        action, step.undo_limit_s or step.limit_s
                    )
            except GeneratorExit:
                raise
            except BaseException as error:
                error.add_note(f"while undoing {step.name} of: {self.plan.name}")
                failures.append(error)
                remains.append(step)
        self.remains = tuple(remains)
        self.state = PlanState.BROKEN if remains else PlanState.ROLLED_BACK
        if remains:
            names = ", ".join(step.name for step in remains)
            cause.add_note(f"not undone of {self.plan.name!r}: {names}")
        _log.info(
            "plan failed",
            extra={
                "op": self.plan.name,
                "state": self.state.value,
                "cause": str(cause),
                "remains": len(remains),
            },
        )
        return failures

    def _perform_undo(self, action: Action, limit_s: float) -> Any:
        try:
            return self._perform(action, limit_s)
        except (VmmExitedError, AgentConnectionError) as error:
            if isinstance(action, NativeCall) or (
                isinstance(action, QmpCall) and isinstance(error, AgentConnectionError)
            ):
                raise
            # What was in the VM is gone with it, and a guest that can't be asked any more keeps nothing from us.
            return None

    def _perform(self, action: Action, limit_s: float) -> Any:
        return self._performers[type(action)](action, self.results, limit_s)
