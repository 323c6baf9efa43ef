"""Who is asked and with what: challenges, tokens, redirects, mirrors, TLS."""

from __future__ import annotations

import json
import ssl
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from casemate import images
from casemate.config.settings import Settings
from casemate.errors import RegistryError
from casemate.images.registry import transport
from tests.support import fake_registry
from tests.support.fake_registry import FakeRegistry, Handler
from tests.support.oci import Layout

pytestmark = [pytest.mark.root, pytest.mark.erofs]


def challenge(handler: Handler, realm: str) -> None:
    handler.send(
        401, WWW_Authenticate=f'Bearer realm="{realm}",service="test",scope="repository:team/app:pull"'
    )


def test_pull_when_a_token_is_wanted_then_fetched_with_the_credential_and_renewed_when_it_ran_out(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    issued: list[str] = []

    def fault(handler: Handler) -> bool:
        if handler.path.startswith("/token"):
            issued.append(f"t0k{len(issued)}")
            handler.send(200, json.dumps({"token": issued[-1]}).encode())
            return True
        # Each token is good for two requests.
        uses = (
            sum(asked.headers.get("Authorization") == f"Bearer {issued[-1]}" for asked in registry.asked)
            if issued
            else 9
        )
        if uses > 2 or handler.headers.get("Authorization") != f"Bearer {issued[-1]}":
            challenge(handler, f"http://{registry.address}/token")
            return True
        return False

    registry.fault = fault
    settings.docker_config.mkdir()
    (settings.docker_config / "config.json").write_text(
        json.dumps({"auths": {registry.address: {"username": "me", "password": "pw"}}}), "utf-8"
    )
    assert images.pull(image, settings=settings).name == image
    tokens = [asked for asked in registry.asked if asked.path.startswith("/token")]
    assert len(tokens) == 2
    assert {asked.headers["Authorization"] for asked in tokens} == {"Basic bWU6cHc="}
    assert {asked.path for asked in tokens} == {"/token?service=test&scope=repository%3Ateam%2Fapp%3Apull"}
    others = {asked.headers.get("Authorization") for asked in registry.asked if asked not in tokens}
    assert others == {None, "Bearer t0k0", "Bearer t0k1"}


def test_pull_when_there_is_an_identity_token_then_exchanged_by_a_form(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    def fault(handler: Handler) -> bool:
        if handler.command == "POST":
            body = handler.rfile.read(int(handler.headers["Content-Length"]))
            handler.send(200 if b"refresh_token=id-tok" in body else 400, b'{"access_token": "t"}')
            return True
        if handler.headers.get("Authorization") != "Bearer t":
            challenge(handler, f"http://{registry.address}/token")
            return True
        return False

    registry.fault = fault
    settings.docker_config.mkdir()
    (settings.docker_config / "config.json").write_text(
        json.dumps({"auths": {registry.address: {"identitytoken": "id-tok"}}}), "utf-8"
    )
    assert images.pull(image, settings=settings).name == image


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"token": "a\\nb"}', b"[" * 100_000, b'{"token": 5}'])
def test_pull_when_the_token_is_none_then_error(
    registry: FakeRegistry, image: str, settings: Settings, answer: bytes
) -> None:
    def fault(handler: Handler) -> bool:
        if handler.path.startswith("/token"):
            handler.send(200, answer)
        else:
            challenge(handler, f"http://{registry.address}/token")
        return True

    registry.fault = fault
    with pytest.raises(RegistryError, match="gave no token") as caught:
        images.pull(image, settings=settings)
    assert caught.value.status == 401


def test_pull_when_tokens_are_never_enough_then_error_not_a_loop(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    count = iter(range(1000))

    def fault(handler: Handler) -> bool:
        if handler.path.startswith("/token"):
            handler.send(200, json.dumps({"token": f"t{next(count)}"}).encode())
        else:
            challenge(handler, f"http://{registry.address}/token")
        return True

    registry.fault = fault
    with pytest.raises(RegistryError, match="refuses .* the tokens it gives"):
        images.pull(image, settings=settings)
    assert len(registry.asked) == 6


def test_pull_when_a_blob_is_elsewhere_then_fetched_there_without_the_credential(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    with fake_registry.running() as storage:
        storage.blobs = registry.blobs

        def fault(handler: Handler) -> bool:
            if handler.headers.get("Authorization") != "Basic bWU6cHc=":
                handler.send(401, WWW_Authenticate='Basic realm="x"')
                return True
            if "/blobs/" not in handler.path:
                return False
            handler.send(307, Location=f"http://{storage.address}{handler.path}?signature=s")
            return True

        registry.fault = fault
        settings.docker_config.mkdir()
        (settings.docker_config / "config.json").write_text(
            json.dumps({"auths": {registry.address: {"username": "me", "password": "pw"}}}), "utf-8"
        )
        images.pull(image, settings=settings)
        assert len(storage.asked) == 2
        assert all("Authorization" not in asked.headers for asked in storage.asked)


def test_pull_when_the_place_of_a_redirect_wants_a_credential_then_it_gets_none(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    with fake_registry.running() as other:

        def refuse(handler: Handler) -> bool:
            challenge(handler, f"http://{other.address}/token")
            return True

        def redirect(handler: Handler) -> bool:
            handler.send(307, Location=f"http://{other.address}{handler.path}")
            return True

        other.fault, registry.fault = refuse, redirect
        settings.docker_config.mkdir()
        (settings.docker_config / "config.json").write_text(
            json.dumps({"auths": {registry.address: {"username": "me", "password": "pw"}}}), "utf-8"
        )
        with pytest.raises(RegistryError, match="status 401"):
            images.pull(image, settings=settings)
        assert [asked.path for asked in other.asked] == ["/v2/team/app/manifests/1"]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://10.0.0.1/x", "without TLS"),
        ("ftp://127.0.0.1/x", "no address of a registry"),
        ("http://[::1/x", "no address"),
        ("http://127.0.0.1:99999/x", "no address"),
        ("file:///etc/passwd", "no address of a registry"),
        ("/v2/team/app/manifests/1", "more than 5 times"),
    ],
)
def test_pull_when_it_is_sent_somewhere_odd_then_error(
    registry: FakeRegistry, image: str, settings: Settings, location: str, words: str
) -> None:
    def fault(handler: Handler) -> bool:
        handler.send(302, Location=location)
        return True

    registry.fault = fault
    with pytest.raises(RegistryError, match=words):
        images.pull(image, settings=settings)


def test_pull_when_there_are_mirrors_then_the_first_that_has_it(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    with fake_registry.running() as empty, fake_registry.running() as gone:
        mirrors = (f"http://{gone.address}", f"http://{empty.address}/hub", f"http://{registry.address}")
        gone.fault = lambda handler: True
        mirrored = replace(settings, registry_mirrors={"127.0.0.1:1": mirrors})
        pulled = images.pull("127.0.0.1:1/team/app:1", settings=mirrored)
        assert pulled.name == "127.0.0.1:1/team/app:1"
        assert next(asked.path for asked in empty.asked) == "/hub/v2/team/app/manifests/1"
    registry.manifests.clear()
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:1 can't be reached") as caught:
        images.pull("127.0.0.1:1/team/app:2", settings=mirrored)
    assert [note.partition(":")[0] for note in caught.value.__notes__] == ["mirror"] * 3


def test_pull_when_the_registry_speaks_tls_then_only_with_a_certificate_that_is_trusted(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    )
    files = ["-keyout", str(key), "-out", str(certificate), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*request.split(), *files], capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    layout = Layout()
    descriptor = layout.add_image([{"a": b"1"}])
    with fake_registry.running(tls=context) as registry:
        registry.add(layout, descriptor, "1")
        mirrored = replace(settings, registry_mirrors={"127.0.0.1:1": (f"https://{registry.address}",)})
        with pytest.raises(RegistryError) as caught:
            images.pull("127.0.0.1:1/app:1", settings=mirrored)
        assert "certificate that can't be trusted: self" in caught.value.__notes__[0]
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert images.pull("127.0.0.1:1/app:1", settings=mirrored).digest == descriptor["digest"]

        def downgrade(handler: Handler) -> bool:
            handler.send(302, Location=f"http://{registry.address}/")
            return True

        registry.fault = downgrade
        with pytest.raises(RegistryError) as caught:
            images.pull("127.0.0.1:1/app:1", settings=mirrored)
        assert "redirects from https to http" in caught.value.__notes__[0]

        def ask_without_tls(handler: Handler) -> bool:
            challenge(handler, "http://127.0.0.1:1/token")
            return True

        registry.fault = ask_without_tls
        with pytest.raises(RegistryError) as caught:
            images.pull("127.0.0.1:1/app:1", settings=mirrored)
        assert "authorisation server without TLS" in caught.value.__notes__[0]


def test_pull_when_a_host_is_not_loopback_then_plain_http_only_when_asked_for(settings: Settings) -> None:
    opened = transport.Transport(is_plain=lambda host: host == "0.0.0.0:1")
    with pytest.raises(RegistryError, match="CASEMATE_PLAIN_HTTP_REGISTRIES"):
        opened.open("http://othe0.0.0.0:1/v2/", headers={})
    with pytest.raises(RegistryError, match="can't be reached"):
        opened.open("http://0.0.0.0:1/v2/", headers={})
