"""Help and completion of every command there is: a walk over the tree, so that a new command is seen by itself."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate.cli import COMMANDS, main
from casemate.cli.completion import SHELLS, nodes
from casemate.cli.manual import PAGES
from casemate.cli.parser import CommandParser, build_parser, subcommands

TREE = list(nodes(build_parser(COMMANDS)))
FISH = pytest.param("fish", marks=pytest.mark.fish)
SYNTAX = [
    ("bash", "-n"),
    pytest.param("zsh", "-n", marks=pytest.mark.zsh),
    pytest.param("fish", "--no-execute", marks=pytest.mark.fish),
]
PATHS = [node.at.strip("/").split("/") for node in TREE if node.at != "/"]


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for below in subcommands(parser).values():
        yield from walk(below)


def completed(shell: str, script: Path, *words: str) -> set[str]:
    """What ``shell`` offers for the last of ``words`` behind ``casemate``."""
    line = " ".join(("casemate", *words))
    programs = {
        "bash": f"source {script}; COMP_WORDS=(casemate {' '.join(words[:-1])} '{words[-1]}'); "
        f"COMP_CWORD={len(words)}; _casemate; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        "fish": f"source {script}; complete -C '{line}'",
    }
    done = subprocess.run(
        [shell, "-c", programs[shell]], capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stderr == ""
    return {row.split("\t")[0] for row in done.stdout.splitlines() if row}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each shell's completion as a file."""
    directory = tmp_path_factory.mktemp("completion")
    files = {}
    with pytest.MonkeyPatch.context() as patch:
        for shell in SHELLS:
            lines: list[str] = []
            patch.setattr("builtins.print", lines.append)
            assert main(["completion", shell]) == 0
            patch.undo()
            files[shell] = directory / shell
            files[shell].write_text("\n".join(lines) + "\n")
    return files


@pytest.mark.parametrize("words", PATHS, ids=" ".join)
def test_help_then_each_command_tells_what_it_does_its_options_and_its_statuses(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])

    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith(f"usage: casemate {' '.join(words)}")
    assert "exit status:\n" in text
    # The second paragraph is the description.
    assert len(text.split("\n\n")[1]) > 20


def test_help_then_every_option_and_command_says_what_it_is() -> None:
    silent = [
        f"{parser.prog} {'/'.join(action.option_strings) or action.dest}"
        for parser in walk(build_parser(COMMANDS))
        for action in parser._actions
        if action.option_strings and not action.help
    ]
    assert silent == []


def test_pages_then_each_belongs_to_a_command_and_its_examples_parse() -> None:
    parsers = {parser.prog: parser for parser in walk(build_parser(COMMANDS))}
    assert set(PAGES) <= set(parsers)
    for prog, page in PAGES.items():
        assert all(prog in line or prog == "casemate" for line, _ in page.examples)
    lines = [line for page in PAGES.values() for line, _ in page.examples]
    words = [
        line.rpartition("casemate ")[2].partition(" > ")[0].partition(" && ")[0].split() for line in lines
    ]
    for one in words:
        build_parser(COMMANDS, only=one[0]).parse_args(one)


def test_parser_when_one_command_is_chosen_then_only_its_module_is_imported() -> None:
    parser = build_parser(COMMANDS, only="ps")

    filled = {name for name, below in subcommands(parser).items() if len(below._actions) > 1}
    assert filled == {"ps"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "no command 'rnu'; did you mean run?"),
        (["zzzzz"], "no command 'zzzzz'; one of run, create,"),
        (["run", "--vcpu", "2", "x"], "casemate run: unknown option --vcpu; did you mean --vcpus?"),
        (["ps", "--qiet"], "did you mean --quiet?"),
        (["ps", "--jsn=1"], "unknown option --jsn; did you mean --json?"),
        (["ps", "--zzzzzzzz"], "casemate ps: unknown option --zzzzzzzz\n"),
        (["ps", "web"], "casemate ps: too many arguments: web"),
        (["guest", "bild"], "casemate guest: there is no action 'bild'; did you mean build?"),
        (["config", "show", "sandboks"], "there is no kind 'sandboks'; did you mean sandbox?"),
        (["completion", "tcsh"], "there is no shell 'tcsh'"),
        (["rm"], "casemate rm: the following arguments are required: SANDBOX"),
        (["run", "--memory", "5Mx", "i"], "casemate run: argument --memory: '5Mx' is no size"),
    ],
)
def test_main_when_a_word_is_wrong_then_the_nearest_right_one_is_told(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)

    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in told
    assert "--help'" in told


def test_completion_then_every_command_and_option_is_in_every_script(scripts: dict[str, Path]) -> None:
    for shell, script in scripts.items():
        text = script.read_text()
        missing = [
            name
            for node in TREE
            for name in (*node.commands, *(name for flag in node.flags for name in flag.names))
            if name.lstrip("-") not in text
        ]
        assert missing == [], shell


@pytest.mark.parametrize("shell", ["bash", FISH])
@pytest.mark.parametrize(
    ("words", "wanted", "unwanted"),
    [
        (["ru"], {"run"}, {"rm"}),
        (["guest", ""], {"build", "show", "list"}, {"run"}),
        (["guest", "build", "--"], {"--refresh", "--kernel", "--json", "--help"}, {"--vcpus"}),
        (["run", "--accel", ""], {"auto", "kvm", "tcg"}, {"run"}),
        (["run", "--mach"], {"--machine"}, {"--memory"}),
        (["config", "show", "s"], {"sandbox", "settings"}, {"container"}),
        (["completion", ""], set(SHELLS), {"tcsh"}),
    ],
)
def test_completion_when_the_shell_asks_then_it_offers_what_fits(
    shell: str, words: list[str], wanted: set[str], unwanted: set[str], scripts: dict[str, Path]
) -> None:
    offered = completed(shell, scripts[shell], *words)
    assert wanted <= offered
    assert not unwanted & offered


@pytest.mark.parametrize("shell", ["bash", FISH])
def test_completion_when_a_sandbox_is_wanted_then_casemate_is_asked_for_names(
    shell: str, scripts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "casemate"
    fake.write_text('#!/bin/sh\n[ "$*" = "ps --quiet" ] && echo web && echo db\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    assert {"web", "db"} <= completed(shell, scripts[shell], "rm", "")


@pytest.mark.parametrize(("shell", "option"), SYNTAX)
def test_completion_then_the_shell_accepts_it(shell: str, option: str, scripts: dict[str, Path]) -> None:
    done = subprocess.run([shell, option, scripts[shell]], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_when_a_command_has_no_page_then_its_summary_serves(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser(prog="casemate new", description="Something new.")

    parser.print_help()

    text = capsys.readouterr().out
    assert "Something new." in text
    assert "exit status:" in text
