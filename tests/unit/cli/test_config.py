"""``casemate config`` and ``casemate env``: documents read, checked and printed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate import SandboxConfig, Settings, TimeoutConfig
from casemate.cli import main
from casemate.cli.document import read_document, to_toml
from casemate.config.container import ContainerConfig
from casemate.errors import CasemateError, HostError, InvalidConfigError, NotFoundError


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASEMATE_STATE_ROOT", str(tmp_path / "state"))
    monkeypatch.setenv("CASEMATE_CACHE", str(tmp_path / "cache"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_show_when_no_file_is_given_then_every_field_stands_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "show", "sandbox"]) == 0

    text = capsys.readouterr().out
    assert SandboxConfig.from_document(tomllib.loads(text)) == SandboxConfig()
    assert all(name in text for name in SandboxConfig.__struct_fields__)
    assert "# cpu_model is not set" in text
    assert all(name in text for name in TimeoutConfig.__struct_fields__)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("box.toml", 'vcpus = 2\nkernel_parameters = ["a=b"]\n[timeouts]\nboot_s = 9\n'),
        ("box.json", '{"vcpus": 2, "kernel_parameters": ["a=b"], "timeouts": {"boot_s": 9}}'),
        ("box", ' {"vcpus": 2, "kernel_parameters": ["a=b"], "timeouts": {"boot_s": 9}}'),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_show_when_a_file_is_given_then_its_fields_come_over_the_defaults(
    name: str, text: str, form: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / name, text)

    assert main(["config", "show", "sandbox", str(file), *form]) == 0

    shown = read_document(write(tmp_path / "shown", capsys.readouterr().out))
    expected = SandboxConfig(vcpus=2, kernel_parameters=("a=b",), timeouts=TimeoutConfig(boot_s=9.0))
    assert SandboxConfig.from_document(shown) == expected


def test_show_when_container_then_variables_are_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "c.toml", 'image = "oci:./x"\n[env]\n"a.b" = "say \\"hi\\""\nC = "é\\u007f"\n')

    assert main(["config", "show", "container", str(file)]) == 0

    shown = tomllib.loads(capsys.readouterr().out)
    assert ContainerConfig.from_document(shown).env == {"a.b": 'say "hi"', "C": "é\x7f"}


def test_show_when_settings_then_the_environment_or_the_file_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", "settings"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["state_root"] == str(tmp_path / "state")

    file = write(tmp_path / "s.toml", 'state_root = "/elsewhere"\ntimeout_factor = 2\n')
    assert main(["config", "show", "settings", str(file)]) == 0
    shown = tomllib.loads(capsys.readouterr().out)
    assert (shown["state_root"], shown["timeout_factor"]) == ("/elsewhere", 2.0)
    assert Settings.from_document(shown) == Settings.from_document(tomllib.loads(file.read_text()))


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("sandbox", "vcpu = 2", "vcpu is no known field; did you mean 'vcpus'?"),
        ("sandbox", "vcpus = 0", "the nearest is 1"),
        ("sandbox", 'vcpus = "2"', "vcpus"),
        ("sandbox", "[timeouts]\nboot_s = -1", "timeouts"),
        ("sandbox", "vcpus = x", "is no TOML: Invalid value (at line 1"),
        ("sandbox", '{"vcpus": }', "is no JSON: Expecting value: line 1"),
        ("sandbox", '{"vcpus": NaN}', "NaN is no number"),
        ("container", "", "image is missing"),
        ("container", 'image = "x"\ncwd = "rel"', "absolute path"),
        ("settings", 'state_root = "rel"', "state_root is 'rel', an absolute path"),
        ("settings", "timeout_factor = 0", "timeout_factor is"),
        ("settings", "stateroot = 1", "did you mean 'state_root'?"),
    ],
)
@pytest.mark.parametrize("action", ["check", "show"])
def test_check_when_a_document_is_wrong_then_status_1_and_its_place(
    action: str, kind: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", action, kind, str(write(tmp_path / "d", text))]) == 1

    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


def test_check_when_a_document_is_right_then_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "check", "sandbox", str(write(tmp_path / "d.toml", "vcpus = 2"))]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b"\xff\xfe", InvalidConfigError, "no text in UTF-8"),
        (b"#" * ((1 << 20) + 1), InvalidConfigError, "larger than 1 MiB"),
        (b"[" * 100_000, InvalidConfigError, "is no TOML"),
        (b'{"a":' * 100_000, InvalidConfigError, "is no JSON"),
    ],
    ids=["binary", "large", "deep-toml", "deep-json"],
)
def test_read_document_when_file_is_hostile_then_a_typed_error(
    content: bytes, kind: type[CasemateError], said: str, tmp_path: Path
) -> None:
    (tmp_path / "d").write_bytes(content)

    with pytest.raises(kind, match=said):
        read_document(tmp_path / "d")


def test_read_document_when_there_is_no_file_then_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_document(tmp_path / "absent")
    with pytest.raises(HostError):
        read_document(tmp_path)
    with pytest.raises(InvalidConfigError, match="no JSON object"):
        read_document(write(tmp_path / "list.json", "[1]"))


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.dictionaries(KEYS, st.one_of(SCALARS, st.lists(SCALARS), st.dictionaries(KEYS, SCALARS))))
def test_to_toml_then_a_toml_reader_gets_the_same_back(document: dict[str, object]) -> None:
    assert tomllib.loads(to_toml(document)) == document


def test_to_toml_when_tables_lie_in_lists_then_they_stand_inline() -> None:
    class Part(msgspec.Struct):
        name: str
        size: int | None = None

    assert tomllib.loads(to_toml({"parts": [Part("a"), Part("b", 2)]})) == {
        "parts": [{"name": "a"}, {"name": "b", "size": 2}]
    }


def test_env_then_versions_paths_and_facts_are_told_in_both_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = write(tmp_path / "qemu", "#!/bin/sh\necho QEMU emulator version 8.1.2\n")
    qemu.chmod(0o755)
    monkeypatch.setenv("CASEMATE_QEMU", str(qemu))

    assert main(["env"]) == 0
    document = tomllib.loads(capsys.readouterr().out)
    assert main(["env", "--json"]) == 0
    as_json = json.loads(capsys.readouterr().out)

    assert document["document_version"] == as_json["document_version"] == 1
    assert document["settings"]["state_root"] == str(tmp_path / "state")
    assert (document["hypervisor"]["path"], document["hypervisor"]["version"]) == (str(qemu), "8.1.2")
    assert document["hypervisor"]["accelerator"] in ("kvm", "tcg")
    assert document["casemate"]["version"] and document["host"]["kernel"]
    assert as_json["guest"]["kernel"] is None
    assert as_json["host"] == document["host"]


def test_env_when_qemu_is_missing_then_that_stands_in_its_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASEMATE_QEMU", "/nowhere/qemu")

    assert main(["env", "--json"]) == 0

    assert "/nowhere/qemu" in json.loads(capsys.readouterr().out)["hypervisor"]["error"]
