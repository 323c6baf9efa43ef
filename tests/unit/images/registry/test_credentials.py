"""Credentials from docker's configuration: where they are looked for, and that they are never shown."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from casemate.errors import HostError, InvalidConfigError
from casemate.images.registry.credentials import Credential, find_credential

HOST = "quay.io"


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    return tmp_path / "docker"


def write(docker: Path, document: object) -> None:
    docker.mkdir()
    (docker / "config.json").write_text(json.dumps(document), "utf-8")


def put_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    path = tmp_path / "bin" / f"docker-credential-{name}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def shown(credential: Credential | None) -> tuple[str, str, str] | None:
    return None if credential is None else (credential.user, credential.secret, credential.identity_token)


@pytest.mark.parametrize(
    ("auths", "host", "expected"),
    [
        ({HOST: {"auth": encoded("me:se:cret")}}, HOST, ("me", "se:cret", "")),
        ({HOST: {"username": "me", "password": "p"}}, HOST, ("me", "p", "")),
        ({f"https://{HOST}/v2/": {"auth": encoded("me:s")}}, HOST, ("me", "s", "")),
        ({"https://index.docker.io/v1/": {"auth": encoded("hub:s")}}, "docker.io", ("hub", "s", "")),
        ({HOST: {"auth": encoded("a:1")}, f"{HOST}/team": {"auth": encoded("b:2")}}, HOST, ("b", "2", "")),
        ({f"{HOST}/tea": {"auth": encoded("b:2")}}, HOST, None),
        ({HOST: {"auth": encoded("me:"), "identitytoken": "tok"}}, HOST, ("me", "", "tok")),
        ({HOST: {}}, HOST, None),
        ({"other.io": {"auth": encoded("a:1")}}, HOST, None),
        ({HOST: {"auth": encoded("a:1")}}, f"{HOST}:5000", None),
    ],
)
def test_find_credential_when_in_the_file_then_the_entry_that_fits_best(
    docker: Path, auths: object, host: str, expected: tuple[str, str, str] | None
) -> None:
    write(docker, {"auths": auths, "HttpHeaders": {"User-Agent": "x"}})
    assert shown(find_credential(docker, host, "team/app")) == expected


def test_find_credential_when_there_is_no_file_then_none(docker: Path) -> None:
    assert find_credential(docker, HOST, "a") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "no docker configuration"),
        (b"[]", "no docker configuration"),
        (b'{"auths": {"quay.io": {"auth": "not base64: s3cret"}}}', "not base64 of USER:SECRET"),
        (b'{"auths": {"quay.io": {"auth": "czNjcmV0"}}}', "not base64 of USER:SECRET"),
        (b'{"auths": {"quay.io": {"auth": 5, "password": "s3cret"}}}', "no docker configuration"),
        (b'{"credsStore": "../../bin/s3cret"}', "a word such as pass is expected"),
    ],
)
def test_find_credential_when_the_file_is_damaged_then_error_without_secrets(
    docker: Path, content: bytes, words: str
) -> None:
    docker.mkdir()
    (docker / "config.json").write_bytes(content)
    with pytest.raises(InvalidConfigError, match=words) as caught:
        find_credential(docker, HOST, "a")
    assert "czNjcmV0" not in str(caught.value) and ": s3cret" not in str(caught.value)


def test_find_credential_when_helpers_then_that_of_the_host_goes_before_the_store_and_the_file(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = """read server; echo '{"Username": "'$0-$server'", "Secret": "s"}' | sed "s#$(dirname $0)/docker-credential-##\""""
    put_helper(tmp_path, monkeypatch, "one", answer)
    put_helper(tmp_path, monkeypatch, "all", answer)
    write(
        docker, {"credHelpers": {HOST: "one"}, "credsStore": "all", "auths": {HOST: {"auth": encoded("a:1")}}}
    )
    assert shown(find_credential(docker, HOST, "a")) == (f"one-{HOST}", "s", "")
    assert shown(find_credential(docker, "docker.io", "a")) == ("all-https://index.docker.io/v1/", "s", "")


def test_find_credential_when_the_store_has_none_then_the_file(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_helper(tmp_path, monkeypatch, "none", "echo 'credentials not found in native keychain'; exit 1")
    write(docker, {"credsStore": "none", "auths": {HOST: {"auth": encoded("a:1")}}})
    assert shown(find_credential(docker, HOST, "a")) == ("a", "1", "")


def test_find_credential_when_the_helper_gives_a_token_then_an_identity_token(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_helper(tmp_path, monkeypatch, "token", """echo '{"Username": "<token>", "Secret": "tok"}'""")
    write(docker, {"credsStore": "token"})
    assert shown(find_credential(docker, HOST, "a")) == ("", "", "tok")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo s3cret; exit 3", "with status 3"),
        ("echo s3cret", "no credential that can be read"),
        ("yes s3cret", "more than 65536 bytes"),
        ("exec sleep 60", "no answer"),
        ("sleep 60 & echo s3cret", "no answer"),
        ("exec >&-; exec sleep 60", "did not end"),
    ],
)
def test_find_credential_when_the_helper_misbehaves_then_error_without_what_it_said(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    put_helper(tmp_path, monkeypatch, "bad", script)
    write(docker, {"credsStore": "bad"})
    with pytest.raises(HostError, match=words) as caught:
        find_credential(docker, HOST, "a", timeout_factor=0.05)
    assert "s3cret" not in str(caught.value)


def test_find_credential_when_the_helper_is_missing_then_error_names_it(docker: Path) -> None:
    write(docker, {"credsStore": "no-such-helper"})
    with pytest.raises(HostError, match="docker-credential-no-such-helper"):
        find_credential(docker, HOST, "a")


def test_credential_when_shown_then_without_its_parts() -> None:
    credential = Credential(user="me", secret="s3cret", identity_token="tok3n")
    assert "s3cret" not in repr(credential) and "tok3n" not in f"{credential}"
    assert credential.basic() == "Basic " + encoded("me:s3cret")
