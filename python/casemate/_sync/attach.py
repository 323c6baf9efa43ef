# Made by scripts/unasync.py from python/casemate/_async/attach.py; do not edit.
"""Reaching a living sandbox of another process: what is found, before a handle is made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from casemate._sync.agent import AgentClient
from casemate._sync.kept import Kept
from casemate._sync.link import dial_agent
from casemate._compat import blocking as compat
from casemate.agent.transport import parse_url
from casemate.config.sandbox import TimeoutConfig
from casemate.config.settings import Settings
from casemate.errors import InvalidStateError, NotFoundError
from casemate.persist.outcome import read_end, with_outcomes
from casemate.persist.record import SandboxRecord
from casemate.persist.store import is_owned, load_record, sandboxes_root
from casemate.types import State

if TYPE_CHECKING:
    from casemate.images import Image

__all__ = ["find_image", "find_living", "reach"]


def find_living(settings: Settings, sandbox_id: str) -> SandboxRecord:
    """The document of a sandbox that runs. Blocks: for file reads.

    Raises:
        NotFoundError: There is none of that name.
        InvalidStateError: Whoever held it is dead, with the cause where a keeper wrote it down; or it does not run yet.
    """
    directory = sandboxes_root(settings) / sandbox_id
    # Looked at first: of one that ends in between the document is there and the owner gone, never the other way round.
    record = load_record(settings, sandbox_id)
    owned = is_owned(settings, sandbox_id)
    if owned and record.state in (State.RUNNING, State.PAUSED):
        return with_outcomes(record, directory)
    found = record.state.value if owned else "dead"
    raise InvalidStateError(
        f"sandbox {sandbox_id!r} is {found}{'' if owned else _cause(settings, record)}, a running one is needed",
        state=found,
        wanted=State.RUNNING.value,
        op="sandbox.attach",
        sandbox_id=sandbox_id,
    )


def _cause(settings: Settings, record: SandboxRecord) -> str:
    if record.keeper is None:
        return ""
    end = read_end(sandboxes_root(settings) / record.id)
    told = "its keeper was killed" if end is None else end.describe()
    return f" ({told}; `casemate cleanup {record.id}` removes what is left)"


def reach(
    settings: Settings, record: SandboxRecord, timeouts: TimeoutConfig
) -> tuple[Kept | None, AgentClient]:
    """Its keeper, if it has one, and a connection to its agent.

    Raises: InvalidStateError, AgentConnectionError, VmmExitedError, DeadlineExceededError.
    Blocks: until the agent is connected.
    """
    kept = None if record.keeper is None else Kept(settings, record, timeouts)
    request_s = timeouts.request_s
    try:
        agent = dial_agent(
            parse_url(record.agent_url), kept, timeout_s=request_s, request_timeout_s=request_s
        )
    except BaseException:
        if kept is not None:
            kept.close()
        raise
    return kept, agent


def find_image(settings: Settings, digest: str) -> Image | None:
    """The image of a container that was made from it; None when it is not in the store any more. Blocks: for file reads."""
    from casemate import images

    try:
        return compat.to_thread(images.resolve, digest, settings=settings)
    except NotFoundError:
        return None
