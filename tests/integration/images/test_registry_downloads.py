"""What goes wrong while bytes come: broken and slow answers, wrong bytes, lies about size, partners that are killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from msgspec.structs import replace

import casemate
from casemate import images
from casemate.config.settings import Settings
from casemate.errors import ImageError, NotFoundError, RegistryError, ResourceExhaustedError
from casemate.images.disk import try_locked
from tests.support import fake_registry
from tests.support.fake_registry import DATA, FakeRegistry, Handler
from tests.support.oci import INDEX, MANIFEST, Json, Layout, sha256

pytestmark = [pytest.mark.root, pytest.mark.erofs]


def layer_of(registry: FakeRegistry) -> str:
    return max(registry.blobs, key=lambda digest: len(registry.blobs[digest]))


def cached(settings: Settings, place: str) -> list[str]:
    return sorted(os.listdir(settings.cache_root / "images" / place))


def asked_for(registry: FakeRegistry, digest: str) -> list[str | None]:
    """The ranges of the requests for a blob."""
    return [asked.headers.get("Range") for asked in registry.asked if asked.path.endswith(digest)]


def cut_after(registry: FakeRegistry, lengths: list[int]) -> None:
    """Let each answer with the layer end after so many bytes, as long as there are lengths."""
    layer = layer_of(registry)

    def fault(handler: Handler) -> bool:
        if not handler.path.endswith(layer) or not lengths:
            return False
        blob = registry.blobs[layer]
        first = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        keep = lengths.pop(0)
        handler.send_head(
            206 if first else 200,
            len(blob) - first,
            Content_Range=f"bytes {first}-{len(blob) - 1}/{len(blob)}",
        )
        handler.wfile.write(blob[first : first + keep])
        return True

    registry.fault = fault


def test_pull_when_the_connection_breaks_then_it_goes_on_from_there(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    cut_after(registry, [100_000, 0, 200_000])
    pulled = images.pull(image, settings=settings)
    assert pulled.size_bytes > len(DATA)
    assert asked_for(registry, layer_of(registry)) == [
        None,
        "bytes=100000-",
        "bytes=100000-",
        "bytes=300000-",
    ]
    assert cached(settings, "parts") == cached(settings, "work") == []


def test_pull_when_it_breaks_again_and_again_then_error_and_the_next_one_goes_on(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    cut_after(registry, [123_456, 0, 0, 0, 0])
    with pytest.raises(RegistryError, match="cut short: 123456 of") as caught:
        images.pull(image, settings=settings)
    assert caught.value.__notes__ == ["123456 bytes are kept; the next pull goes on from there"]
    assert cached(settings, "work") == [] and len(cached(settings, "parts")) == 1
    registry.asked.clear()
    images.pull(image, settings=settings)
    assert asked_for(registry, layer_of(registry)) == ["bytes=123456-"]
    assert cached(settings, "parts") == []


@pytest.fixture
def stuck(registry: FakeRegistry, image: str, settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that pulls the image and has 400,000 bytes of its layer; nobody else is held up."""
    layer = layer_of(registry)

    def hang(handler: Handler) -> bool:
        if not handler.path.endswith(layer) or "Range" in handler.headers:
            return False
        handler.send_head(200, len(registry.blobs[layer]))
        handler.wfile.write(registry.blobs[layer][:400_000])
        registry.ended.wait(60)
        return True

    registry.fault = hang
    code = (
        "import sys; from pathlib import Path; import casemate\n"
        "casemate.pull(sys.argv[1], settings=casemate.Settings(cache_root=Path(sys.argv[2])))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, image, str(settings.cache_root)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        part = settings.cache_root / "images/parts" / layer[7:]
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size == 400_000):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        yield process
        process.kill()


def test_pull_when_a_process_is_killed_then_the_next_one_goes_on(
    stuck: subprocess.Popen[bytes], registry: FakeRegistry, image: str, settings: Settings
) -> None:
    stuck.send_signal(signal.SIGKILL)
    stuck.wait(10)
    images.pull(image, settings=settings)
    assert asked_for(registry, layer_of(registry)) == [None, "bytes=400000-"]
    assert cached(settings, "parts") == cached(settings, "work") == []


def test_pull_when_the_one_it_waits_for_is_killed_then_it_goes_on_itself(
    stuck: subprocess.Popen[bytes], registry: FakeRegistry, image: str, settings: Settings
) -> None:
    told: list[str] = []

    def kill_when_waiting(event: images.Progress) -> None:
        told.append(event.phase)
        stuck.send_signal(signal.SIGKILL)

    pulled = images.pull(image, settings=settings, progress=kill_when_waiting)
    assert told[0] == "wait" and "download" in told
    assert pulled.name == image
    assert asked_for(registry, layer_of(registry)) == [None, "bytes=400000-"]
    assert cached(settings, "parts") == cached(settings, "work") == []


def test_pull_when_ranges_are_ignored_then_the_whole_blob_again(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    cut_after(registry, [100_000])
    registry.ignores_ranges = True
    images.pull(image, settings=settings)
    assert asked_for(registry, layer_of(registry)) == [None, "bytes=100000-"]


def test_pull_when_a_part_was_damaged_where_it_lay_then_fetched_whole(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    part = settings.cache_root / "images/parts" / layer_of(registry)[7:]
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(5000))
    images.pull(image, settings=settings)
    assert asked_for(registry, layer_of(registry)) == ["bytes=5000-", None]


@pytest.mark.parametrize("content", [DATA + bytes(200_000), b"", None])
def test_pull_when_a_part_is_longer_or_whole_already_then_as_much_as_needed_is_fetched(
    registry: FakeRegistry, image: str, settings: Settings, content: bytes | None
) -> None:
    layer = layer_of(registry)
    part = settings.cache_root / "images/parts" / layer[7:]
    part.parent.mkdir(parents=True)
    part.write_bytes(registry.blobs[layer] if content is None else content)
    images.pull(image, settings=settings)
    assert asked_for(registry, layer) == ([] if content is None else [None])


@pytest.mark.parametrize("wrong", [b"x" * 700_000, b""])
def test_pull_when_bytes_are_not_those_of_the_digest_then_error_and_nothing_is_kept(
    registry: FakeRegistry, image: str, settings: Settings, wrong: bytes
) -> None:
    layer = layer_of(registry)
    right = registry.blobs[layer]
    registry.blobs[layer] = wrong.ljust(len(right), b"\0") + (b"" if wrong else b"more")
    with pytest.raises(ImageError, match="is sha256:" if wrong else "has more than") as caught:
        images.pull(image, settings=settings)
    assert caught.value.digest == layer
    assert cached(settings, "parts") == cached(settings, "work") == [] and images.list_images(settings) == []
    registry.blobs[layer] = right
    assert images.pull(image, settings=settings).name == image


@pytest.mark.parametrize("which", ["manifest", "header", "configuration"])
def test_pull_when_a_document_is_not_that_of_its_digest_then_error(
    registry: FakeRegistry, image: str, settings: Settings, which: str
) -> None:
    data, media_type = registry.manifests["1"]
    config = json.loads(data)["config"]["digest"]
    name = image
    if which == "manifest":
        registry.manifests[sha256(data)] = (data + b" ", media_type)
        name = f"{image[:-2]}@{sha256(data)}"
    if which == "configuration":
        registry.blobs[config] += b" "

    def fault(handler: Handler) -> bool:
        if "manifests" not in handler.path or which != "header":
            return False
        handler.send(200, data, Content_Type=media_type, Docker_Content_Digest=f"sha256:{'0' * 64}")
        return True

    registry.fault = fault
    with pytest.raises(ImageError, match="is damaged: its digest is"):
        images.pull(name, settings=settings)
    assert images.list_images(settings) == []


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (404, b"no json", NotFoundError, "has no image"),
        (
            403,
            b'{"errors": [{"message": "quota \\u001b[31m"}]}',
            RegistryError,
            r"status 403: quota \[31m; log in with",
        ),
        (429, b'{"errors": [{"code": "TOOMANYREQUESTS"}]}', RegistryError, "status 429: TOOMANYREQUESTS$"),
        (500, b"\xff", RegistryError, "status 500$"),
        (200, b"<html>", ImageError, "manifest of image .* can't be read"),
        (200, b" " * (4 << 20) + b"{}", RegistryError, "more than 4194304 bytes"),
    ],
)
def test_pull_when_the_registry_answers_with_an_error_then_typed_and_printable(
    registry: FakeRegistry,
    image: str,
    settings: Settings,
    status: int,
    body: bytes,
    error: type[Exception],
    words: str,
) -> None:
    def fault(handler: Handler) -> bool:
        handler.send(status, body)
        return True

    registry.fault = fault
    with pytest.raises(error, match=words):
        images.pull(image, settings=settings)
    assert not settings.cache_root.exists()


def test_pull_when_blobs_fail_for_a_while_then_asked_again(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    statuses = [503, 429, 500]

    def fault(handler: Handler) -> bool:
        if not handler.path.endswith(layer_of(registry)) or not statuses:
            return False
        handler.send(statuses.pop(0))
        return True

    registry.fault = fault
    assert images.pull(image, settings=settings).name == image
    assert len(asked_for(registry, layer_of(registry))) == 4


def test_pull_when_nobody_listens_then_error_at_once(settings: Settings) -> None:
    with fake_registry.running() as gone:
        address = gone.address
    with pytest.raises(RegistryError, match="can't be reached") as caught:
        images.pull(f"{address}/a:1", settings=settings)
    assert (caught.value.registry, caught.value.status) == (address, 0)


@pytest.mark.parametrize("where", ["head", "body"])
def test_pull_when_a_byte_comes_now_and_then_then_deadline(
    registry: FakeRegistry, image: str, settings: Settings, where: str
) -> None:
    layer = layer_of(registry)

    def drip(handler: Handler) -> bool:
        if not handler.path.endswith(layer):
            return False
        handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nX: "
            if where == "head"
            else b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n"
        )
        while not registry.ended.wait(0.05):
            handler.wfile.write(b"x")
        return True

    registry.fault = drip
    began = time.monotonic()
    with pytest.raises(RegistryError, match="timed out"):
        images.pull(image, settings=replace(settings, timeout_factor=0.01))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"size": 1 << 40}, ImageError, r"layers of image .* have 1099511627776 bytes"),
        ({"size": 60 << 30}, ResourceExhaustedError, "are free in"),
        ({"size": -1}, ImageError, "has no size"),
        ({"size": None}, ImageError, "can't be read"),
        ({"digest": "sha256:../../../etc/passwd"}, ImageError, "64 lower-case"),
        ({"digest": f"md5:{'0' * 32}"}, ImageError, "64 lower-case"),
        ({"mediaType": "application/x-other"}, ImageError, "media type 'application/x-other'"),
    ],
)
def test_pull_when_the_manifest_lies_then_error_before_a_layer_is_asked_for(
    registry: FakeRegistry,
    image: str,
    settings: Settings,
    change: Json,
    error: type[Exception],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status = os.statvfs("/")
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*status[:4], 1000, *status[5:])))
    layer = layer_of(registry)
    manifest = json.loads(registry.manifests["1"][0])
    manifest["layers"][0] |= change
    registry.manifests["1"] = (json.dumps(manifest).encode(), MANIFEST)
    with pytest.raises(error, match=words):
        images.pull(image, settings=settings)
    assert asked_for(registry, layer) == [] and images.list_images(settings) == []


def test_pull_when_the_index_has_many_platforms_then_ours(registry: FakeRegistry, settings: Settings) -> None:
    layout = Layout()
    described = []
    for architecture, variant in (("arm64", "v8"), ("amd64", ""), ("unknown", "")):
        descriptor = layout.add_image([{architecture: b"x"}], architecture=architecture)
        registry.add(layout, descriptor, architecture)
        platform = {
            "os": "unknown" if architecture == "unknown" else "linux",
            "architecture": architecture,
            "variant": variant,
        }
        described.append({**descriptor, "platform": platform})
    digest = registry.add_index(described, "all")
    outer = registry.add_index([{"mediaType": INDEX, "digest": digest, "size": 1}], "nested")
    pulled = images.pull(f"{registry.address}/app:all", settings=settings)
    assert pulled.digest == described[1]["digest"]
    by_index = images.pull(f"{registry.address}/app@{outer}", settings=settings)
    assert (by_index.digest, by_index.name) == (pulled.digest, f"{registry.address}/app@{outer}")
    registry.add_index(described[::2], "others")
    with pytest.raises(ImageError, match="its index lists linux/arm64, unknown/unknown"):
        images.pull(f"{registry.address}/app:others", settings=settings)


def test_pull_when_progress_raises_then_it_comes_through_and_the_part_is_kept(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    def stop(progress: images.Progress) -> None:
        raise OSError(28, "not the disk's")

    with pytest.raises(OSError, match="not the disk's"):
        images.pull(image, settings=settings, progress=stop)
    assert len(cached(settings, "parts")) == 1 and cached(settings, "work") == []


async def test_async_pull_when_cancelled_then_the_download_ends_and_the_part_is_kept(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    layer = layer_of(registry)
    under_way = threading.Event()

    def slowly(handler: Handler) -> bool:
        if not handler.path.endswith(layer):
            return False
        handler.send_head(200, 10 * len(DATA))
        while not registry.ended.wait(0.01):
            handler.wfile.write(bytes(1000))
        return True

    registry.fault = slowly
    manifest = json.loads(registry.manifests["1"][0])
    manifest["layers"][0]["size"] = 10 * len(DATA)
    registry.manifests["1"] = (json.dumps(manifest).encode(), MANIFEST)
    patient = replace(settings, timeout_factor=10.0)
    pull = asyncio.ensure_future(
        casemate.async_pull(image, settings=patient, progress=lambda event: under_way.set())
    )
    assert await asyncio.to_thread(under_way.wait, 20)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    deadline = time.monotonic() + 20
    while cached(settings, "work"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert len(cached(settings, "parts")) == 1


def test_pull_when_two_images_share_a_layer_then_both_come(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    layout = Layout()
    registry.add(layout, layout.add_image([{"data": DATA}, {"more": b"m"}]), "2")
    both_asked = threading.Barrier(2)

    def together(handler: Handler) -> bool:
        if "/manifests/" in handler.path:
            both_asked.wait(20)
        return False

    registry.fault = together
    with ThreadPoolExecutor(2) as pool:
        pulled = list(pool.map(lambda tag: images.pull(f"{image[:-1]}{tag}", settings=settings), "12"))
    assert [one.name for one in pulled] == [image, f"{image[:-1]}2"]
    assert pulled[0].digest != pulled[1].digest
    assert cached(settings, "work") == []


def test_pull_when_another_process_makes_the_image_then_the_wait_is_told_and_can_be_ended(
    registry: FakeRegistry, image: str, settings: Settings
) -> None:
    digest = sha256(registry.manifests["1"][0])
    locks = settings.cache_root / "images/locks"
    locks.mkdir(parents=True)

    def stop(progress: images.Progress) -> None:
        assert progress.phase == "wait"
        raise KeyboardInterrupt

    with try_locked(locks / digest[7:]) as held, pytest.raises(KeyboardInterrupt):
        assert held is not None
        images.pull(image, settings=settings, progress=stop)
    assert images.pull(image, settings=settings).digest == digest
