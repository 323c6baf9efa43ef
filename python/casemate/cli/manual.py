"""What ``--help`` tells beyond the options: description, exit status and examples of each command. Imported for help alone."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence

import msgspec

__all__ = ["PAGES", "Page", "page"]

_FAILED = {"0": "done", "1": "it failed; the reason is on stderr", "2": "wrong use"}
_PROCESS = {
    "125": "casemate failed before the command ran; the reason is on stderr",
    "126": "the command can't be executed",
    "127": "there is no such command",
}
_MOST_COLUMNS = 100


class Page(msgspec.Struct, frozen=True):
    """One command's page.

    Args:
        text: What it does, in paragraphs; empty for the summary alone.
        examples: Command lines with what each does.
        status: Exit statuses that mean something else than with most commands.
    """

    text: str = ""
    examples: Sequence[tuple[str, str]] = ()
    status: Mapping[str, str] = {}


PAGES: dict[str, Page] = {
    "casemate": Page(
        "OCI containers inside virtual machines: one machine a sandbox, a guest agent in it, containers in the guest.\n\n"
        "Results go to stdout, everything else to stderr. Environment: CASEMATE_STATE_ROOT, CASEMATE_CACHE, CASEMATE_QEMU, "
        "CASEMATE_TIMEOUT_FACTOR; 'casemate env' shows what they come to.",
        (
            ("casemate check", "can this host do it?"),
            ("casemate run oci:./debian -- uname -r", "a command in a machine of its own"),
            ("casemate completion bash > /etc/bash_completion.d/casemate", "completion"),
        ),
    ),
    "casemate run": Page(
        "Boots a machine, runs one container in it, and removes both when the command ends. Signals go to the command. "
        "The sandbox ends with this process, however that ends.",
        (
            ("casemate run oci:./debian -- sh -c 'echo hi'", "output and status are the command's"),
            ("casemate run docker://registry.example/app:1", "pulled first, when it is not here"),
            ("casemate run -it oci:./debian bash", "a terminal"),
            ("echo hi | casemate run -i oci:./debian -- cat", "input passed on"),
            ("casemate run --vcpus 2 --memory 1G --machine microvm oci:./debian nproc", "another machine"),
            ("casemate run --json oci:./debian -- id", "output, status and phases of the start as JSON"),
        ),
        {"other": "that of the command; 128 + n when signal n ended it", **_PROCESS},
    ),
    "casemate exec": Page(
        "Runs another command in a container of a sandbox that lives, also when another process owns it.",
        (
            ("casemate exec web -- ps", "a command beside the first"),
            ("casemate exec -it web sh", "with a terminal"),
        ),
        {"other": "that of the command; 128 + n when signal n ended it", **_PROCESS},
    ),
    "casemate ps": Page(
        "Lists sandboxes, one line a container. Those whose owner was killed are 'dead': 'casemate cleanup' removes what is left of them.",
        (("casemate ps", ""), ("casemate ps -q", "names only")),
    ),
    "casemate inspect": Page(
        "Prints all that is known of a sandbox, else of an image, as JSON.",
        (("casemate inspect web", "state, machine, accelerator with its reason, containers"),),
    ),
    "casemate kill": Page(
        "Sends a signal to the first process of a container, or to all of its processes.",
        (
            ("casemate kill -s TERM web", "ask it to end"),
            ("casemate kill --all web", "end all that runs in it"),
        ),
    ),
    "casemate rm": Page(
        "Removes what a dead sandbox left; with --force also a living one, whose owner is asked to end.",
        (("casemate rm --force web", ""),),
    ),
    "casemate cleanup": Page(
        "Removes what owners left that were killed: process, sockets, directory, from what lies on disk alone. Idempotent; "
        "a sandbox with a living owner is never touched.",
        (("casemate cleanup --all", "after a crash"), ("casemate cleanup web", "one")),
    ),
    "casemate pull": Page(
        "Brings an image here from its registry and unpacks it, so that a start finds it. Credentials come from docker's "
        "configuration and its helpers; a download that broke off goes on where it stopped. Name and digest go to stdout.\n\n"
        "A name without a host is one of CASEMATE_DEFAULT_REGISTRY (docker.io). 'run' looks for a bare name among paths and the images "
        "that are here, and asks a registry for 'docker://NAME' alone.",
        (
            (
                "casemate pull debian:12",
                "docker.io/library/debian:12; 'casemate run debian:12' finds it then",
            ),
            ("casemate pull registry.example:5000/team/app:1", ""),
            ("casemate pull --plain-http registry.example:5000/app", "a registry without TLS"),
        ),
    ),
    "casemate images": Page(
        "Lists the images that are here, or removes some.",
        (("casemate images", ""), ("casemate images gc --dry-run", "what nobody needs any more")),
    ),
    "casemate images ls": Page("Lists the images that are here.", (("casemate images ls --json", ""),)),
    "casemate images rm": Page(
        "Removes images by name or digest. What a sandbox uses stays, unless forced; the others of the list go all the same.",
        (("casemate images rm debian:latest", ""),),
    ),
    "casemate images gc": Page(
        "Removes images that no start used for a while, and as old parts of downloads. What a sandbox uses stays, and what was used "
        "in the last hour.",
        (("casemate images gc --older-than 7d", ""), ("casemate images gc --dry-run", "only tell")),
    ),
    "casemate rmi": Page(
        "Removes images by name or digest, as 'casemate images rm' does.",
        (("casemate rmi debian:latest", ""),),
    ),
    "casemate check": Page(
        "Tells what this host can do, by trying it: accelerator, vsock, tap devices, cgroups, memory, disk, tools. For whatever is not "
        "there it says why and what to do. Nothing is changed, no module loaded.\n\n"
        "With --boot a small guest is really booted, with KVM where that can make VMs and with software emulation. What comes out "
        "is kept until the host restarts or its QEMU or KVM changes, and decides what accel 'auto' means from then on.",
        (
            ("casemate check", "what there is, what is missing, what to do"),
            ("casemate check --boot", "the same, proven by guests; up to some minutes"),
            ("casemate check --json", "for machines"),
        ),
        {"0": "sandboxes can start", "1": "something that every sandbox needs is missing"},
    ),
    "casemate env": Page(
        "Prints versions, paths and facts of host, guest and VMM, as TOML or JSON: what to put into a report of a problem.",
        (("casemate env", ""), ("casemate env --json", "")),
    ),
    "casemate config": Page("Documents: 'sandbox', 'container' and 'settings', in TOML or JSON."),
    "casemate config show": Page(
        "Prints a document with every default spelt out, as TOML or JSON; without a file, the defaults (of 'settings': what the "
        "environment comes to). What is not set stands as a comment in TOML, as null in JSON.",
        (
            ("casemate config show sandbox", "all fields of a sandbox"),
            ("casemate config show sandbox web.toml", "the same, as this file sets them"),
        ),
    ),
    "casemate config check": Page(
        "Reads a document and checks it; the first fault is told with its place. Prints nothing when there is none.",
        (("casemate config check sandbox web.toml && echo good", ""),),
    ),
    "casemate guest": Page("The kernels and initrds that guests boot from, in the cache."),
    "casemate guest build": Page(
        "Fetches a kernel and makes its initrd, unless they are in the cache: the first start does the same.",
        (
            ("casemate guest build", "the newest kernel"),
            ("casemate guest build --kernel 6.12 --refresh", "the newest of a series, looked up again"),
        ),
    ),
    "casemate guest show": Page(examples=(("casemate guest show --machine microvm", ""),)),
    "casemate guest list": Page(examples=(("casemate guest list", ""),)),
    "casemate bench": Page(
        "Measures beside a peer in the same run; figures are ratios, so they hold on another machine."
    ),
    "casemate bench startup": Page(
        "Times starts from the call to the first output byte against a floor: the same QEMU, machine and kernel with an init that "
        "prints one byte.",
        (("casemate bench startup -n 10 --json", ""),),
    ),
    "casemate completion": Page(
        "Prints the completion of a shell, made from the commands and options that this version has.",
        (
            ("casemate completion bash > /etc/bash_completion.d/casemate", ""),
            ("casemate completion zsh > /usr/share/zsh/site-functions/_casemate", ""),
            ("casemate completion fish > ~/.config/fish/completions/casemate.fish", ""),
        ),
    ),
}


def page(prog: str, summary: str) -> tuple[str, str]:
    """Description and epilog for the command ``prog`` (``casemate guest build``), wrapped for the terminal."""
    known = PAGES.get(prog, Page())
    columns = min(shutil.get_terminal_size().columns - 2, _MOST_COLUMNS)
    paragraphs = [
        textwrap.fill(one, columns, break_on_hyphens=False) for one in (known.text or summary).split("\n\n")
    ]
    lines = ["exit status:"]
    # What a command does not say is as with most; those that pass a status on have no 1 of their own.
    statuses = {**({"2": _FAILED["2"]} if "other" in known.status else _FAILED), **known.status}
    lines += [f"  {number:<6}{text}" for number, text in statuses.items()]
    if known.examples:
        lines += ["", "examples:"]
        for line, what in known.examples:
            lines += [f"  $ {line}", *([f"      {what}"] if what else [])]
    return "\n\n".join(paragraphs), "\n".join(lines)
