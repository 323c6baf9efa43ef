"""``casemate completion``: scripts for bash, zsh and fish, made from the tree of parsers, so that they know what this version knows."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence

import msgspec

from casemate.cli import COMMANDS
from casemate.cli.parser import build_parser, subcommands, summaries

SHELLS = ("bash", "zsh", "fish")
_PATHS = ("FILE", "PATH", "IMAGE", "COMMAND")
"""What arguments are called whose value may be a path of the host."""
NAMES = "casemate ps --quiet"
"""Prints the names of sandboxes, for arguments that are one."""


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """One option: its spellings, what it says of itself, whether a value follows, which are known, whether it is a path of the host."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...] = ()
    files: bool = False


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One command: its words joined by ``/``, its subcommands with their summaries, its options, and what its arguments can be."""

    at: str
    commands: dict[str, str]
    flags: tuple[Flag, ...]
    sandboxes: bool
    files: bool
    choices: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``completion``."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")


def run(options: argparse.Namespace) -> int:
    """Print the completion of a shell."""
    writers: dict[str, Callable[[Sequence[Node]], Iterator[str]]] = {
        "bash": _bash,
        "zsh": _zsh,
        "fish": _fish,
    }
    print("\n".join(writers[options.shell](list(nodes(build_parser(COMMANDS))))))
    return 0


def nodes(parser: argparse.ArgumentParser, at: str = "") -> Iterator[Node]:
    """``parser`` and all below it, parents first."""
    told = summaries(parser)
    below = subcommands(parser)
    positionals = [
        action
        for action in parser._actions
        if not action.option_strings and not isinstance(action, argparse._SubParsersAction)
    ]
    yield Node(
        at=at or "/",
        commands={name: told.get(name, "") for name in below},
        flags=tuple(
            Flag(
                names=tuple(action.option_strings),
                help=_plain(action.help or ""),
                takes_value=action.nargs != 0,
                choices=_choices(action),
                files=action.metavar in _PATHS,
            )
            for action in parser._actions
            if action.option_strings
        ),
        sandboxes=any(action.metavar == "SANDBOX" for action in positionals),
        files=any(action.metavar in _PATHS for action in positionals),
        choices=tuple(choice for action in positionals for choice in _choices(action)),
    )
    for name, command in below.items():
        yield from nodes(command, f"{at}/{name}")


def _choices(action: argparse.Action) -> tuple[str, ...]:
    """Values that are known: those of argparse, or those that the help names as ``one|other``."""
    if action.choices:
        return tuple(map(str, action.choices))
    named = action.metavar if isinstance(action.metavar, str) and "|" in action.metavar else ""
    return tuple(word for word in named.split("|") if word)


def _plain(text: str) -> str:
    """One line without characters that any of the three shells reads as its own."""
    return re.sub(r"[^\w .,;/()|=+-]", "", text, flags=re.ASCII)


def _paths(tree: Sequence[Node]) -> list[str]:
    return [node.at for node in tree if node.at != "/"]


def _words(node: Node) -> str:
    return " ".join([*node.commands, *node.choices])


def _one(yes: bool) -> str:
    return "1" if yes else '""'


def _bash(tree: Sequence[Node]) -> Iterator[str]:
    yield "# Completion of casemate for bash, made by 'casemate completion bash'."
    yield "_casemate() {"
    yield '    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" at=/ word i flags="" words="" files=""'
    yield "    COMPREPLY=()"
    yield "    for ((i = 1; i < COMP_CWORD; i++)); do"
    yield '        word="${at%/}/${COMP_WORDS[i]}"'
    yield '        case "$word" in'
    yield f"            {'|'.join(_paths(tree))}) at=$word ;;"
    yield "        esac"
    yield "    done"
    yield '    case "$at $prev" in'
    for node in tree:
        for flag in node.flags:
            if flag.takes_value:
                patterns = "|".join(f'"{node.at} {name}"' for name in flag.names)
                yield f'        {patterns}) flags="" words="{" ".join(flag.choices)}" files={_one(flag.files)} at="" ;;'
    yield "    esac"
    yield '    case "$at" in'
    for node in tree:
        flags = " ".join(name for flag in node.flags for name in flag.names)
        line = f'        {node.at}) flags="{flags}" words="{_words(node)}" files={_one(node.files)}'
        if node.sandboxes:
            line += f'; [[ $cur == -* ]] || words="$({NAMES} 2>/dev/null)"'
        yield f"{line} ;;"
    yield "    esac"
    yield '    [[ $cur == -* ]] && words=$flags files=""'
    yield '    COMPREPLY=($(compgen -W "$words" -- "$cur"))'
    yield "    if [[ -n $files ]]; then"
    yield "        compopt -o filenames 2>/dev/null"
    yield '        COMPREPLY+=($(compgen -f -- "$cur"))'
    yield "    fi"
    yield "}"
    yield "complete -F _casemate casemate"


def _zsh(tree: Sequence[Node]) -> Iterator[str]:
    yield "#compdef casemate"
    yield "# Completion of casemate for zsh, made by 'casemate completion zsh'."
    yield "_casemate() {"
    yield "    local at=/ word i prev=${words[CURRENT-1]}"
    yield "    local -a flags commands"
    yield "    for ((i = 2; i < CURRENT; i++)); do"
    yield '        word="${at%/}/${words[i]}"'
    yield '        case "$word" in'
    yield f"            {'|'.join(_paths(tree))}) at=$word ;;"
    yield "        esac"
    yield "    done"
    yield '    case "$at $prev" in'
    for node in tree:
        for flag in node.flags:
            if flag.takes_value:
                patterns = "|".join(f'"{node.at} {name}"' for name in flag.names)
                action = (
                    f"compadd -- {' '.join(flag.choices)}; "
                    if flag.choices
                    else "_files; "
                    if flag.files
                    else ""
                )
                yield f"        {patterns}) {action}return ;;"
    yield "    esac"
    yield '    case "$at" in'
    for node in tree:
        flags = " ".join(f"'{name}:{flag.help}'" for flag in node.flags for name in flag.names)
        commands = " ".join(f"'{name}:{_plain(told)}'" for name, told in node.commands.items())
        commands = " ".join(filter(None, [commands, *(f"'{choice}:'" for choice in node.choices)]))
        yield f"        {node.at}) flags=({flags}) commands=({commands}) ;;"
    yield "    esac"
    yield "    if [[ $PREFIX == -* ]]; then"
    yield "        _describe 'option' flags"
    yield "        return"
    yield "    fi"
    yield "    (( $#commands )) && _describe 'command' commands"
    sandboxes = "|".join(node.at for node in tree if node.sandboxes)
    if sandboxes:
        yield f'    [[ $at == ({sandboxes}) ]] && compadd -- ${{(f)"$({NAMES} 2>/dev/null)"}}'
    filed = "|".join(node.at for node in tree if node.files)
    if filed:
        yield f"    [[ $at == ({filed}) ]] && _files"
    yield "    return 0"
    yield "}"
    yield 'if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _casemate "$@"; else compdef _casemate casemate; fi'


def _fish(tree: Sequence[Node]) -> Iterator[str]:
    yield "# Completion of casemate for fish, made by 'casemate completion fish'."
    yield "function __casemate_at"
    yield "    set -l at /"
    yield "    set -l words (commandline -opc)"
    yield "    for word in $words[2..-1]"
    yield "        switch (string trim -r -c / -- $at)/$word"
    yield f"            case {' '.join(_paths(tree))}"
    yield "                set at (string trim -r -c / -- $at)/$word"
    yield "        end"
    yield "    end"
    yield '    test "$at" = "$argv[1]"'
    yield "end"
    yield "complete -c casemate -f"
    for node in tree:
        here = f"complete -c casemate -n '__casemate_at {node.at}'"
        for name, told in node.commands.items():
            yield f"{here} -a {name} -d '{_plain(told)}'"
        if node.choices:
            yield f"{here} -a '{' '.join(node.choices)}'"
        if node.sandboxes:
            yield f"{here} -a '({NAMES} 2>/dev/null)'"
        if node.files:
            yield f"{here} -F"
        for flag in node.flags:
            names = " ".join(
                f"-l {one[2:]}" if one.startswith("--") else f"-s {one[1:]}" for one in flag.names
            )
            value = " -x" if flag.takes_value else ""
            if flag.choices:
                value = f" -x -a '{' '.join(flag.choices)}'"
            elif flag.files:
                value = " -r -F"
            yield f"{here} {names}{value} -d '{flag.help}'"
