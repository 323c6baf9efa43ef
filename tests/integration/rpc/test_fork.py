"""A process that holds a sandbox forks: the fork can't use it, its end harms nothing."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

from tests.support.fake_vm import FakeVm

# In a process of its own: a fork of the test's would run the test's ends.
OWNER = """
import json, os, pickle, sys
from casemate import CasemateError, Sandbox

config, container, settings = pickle.load(sys.stdin.buffer)

def refusal(call):
    try:
        call()
    except CasemateError as error:
        return type(error).__name__
    return "none"

with Sandbox.create(config, containers=(container,), start=True, settings=settings) as sandbox:
    process = sandbox.container().exec(["cat"])
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        told = [
            refusal(lambda: sandbox.container().exec(["true"])),
            refusal(lambda: process.wait(1)),
            refusal(lambda: sandbox.create_container(container)),
            refusal(sandbox.pause),
            refusal(sandbox.stop),
        ]
        os.write(writing, json.dumps(told).encode())
        sys.exit(3)  # through the end of the with statement
    os.close(writing)
    told = json.loads(os.read(reading, 1000))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    alive = sandbox.container().exec(["echo", "alive"], capture=True).stdout
    process.signal(9)
    process.wait()
    os.kill(sandbox.vmm_pid, 0)
print(json.dumps({"told": told, "status": status, "alive": alive}))
"""


def test_fork_when_it_uses_or_leaves_the_sandbox_then_refused_and_the_owners_lives(fake_vm: FakeVm) -> None:
    parts = pickle.dumps((fake_vm.config("forked"), fake_vm.container(), fake_vm.settings))
    done = subprocess.run([sys.executable, "-c", OWNER], input=parts, capture_output=True, timeout=25)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout) == {
        "told": [
            "InternalError",
            "InternalError",
            "InvalidStateError",
            "InvalidStateError",
            "InvalidStateError",
        ],
        "status": 3,
        "alive": "alive\n",
    }
