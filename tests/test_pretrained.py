"""Sources of pretrained weights, against real servers on this machine: HTTP of every temper, and S3."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rfdetr_core import pretrained
from rfdetr_core.errors import (
    CheckpointError,
    ConfigError,
    MissingObjectError,
    RFDETRError,
    StorageAccessError,
    StorageUnavailableError,
)
from rfdetr_core.models.published import PUBLISHED, PublishedFile
from rfdetr_core.pretrained import cache_folder, fetch_weights, store_weights
from rfdetr_core.storage import Location, location
from tests.s3_server import s3_root, s3_server
from tests.storage.faulty_server import Answer, faulty_server, hang_up, ok
from tests.storage.test_s3_failures import certificate

__all__ = ["certificate", "s3_root", "s3_server"]

DATA = bytes(range(256)) * 5000  # more than one chunk


@dataclass
class WebServer:
    """Serves `body`; what a test changes is how."""

    url: str = ""
    body: bytes = DATA
    etag: str = '"v1"'
    ranges: bool = True
    length: bool = True
    """Whether the size is announced; without it the answer is sent in chunks."""
    cut: list[int] = field(default_factory=list)
    """After how many bytes each of the next answers breaks off."""
    status: list[int] = field(default_factory=list)
    """What the next requests are refused with."""
    redirect: str = ""
    requests: list[dict[str, str]] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append({"path": handler.path, **handler.headers})
        if self.status:
            return self.refuse(handler, self.status.pop(0))
        if self.redirect and handler.path != "/moved/weights.pth":
            handler.send_response(302)
            handler.send_header("Location", self.redirect)
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        if self.etag and handler.headers.get("If-None-Match") == self.etag:
            return self.refuse(handler, 304)
        self.send(handler)

    def send(self, handler: BaseHTTPRequestHandler) -> None:
        start, wanted = 0, handler.headers.get("Range", "")
        if self.ranges and wanted and handler.headers.get("If-Range") == self.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.body):
                return self.refuse(handler, 416, **{"Content-Range": f"bytes */{len(self.body)}"})
        body = self.body[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        if self.etag:
            handler.send_header("ETag", self.etag)
        name = "Content-Length" if self.length else "Transfer-Encoding"
        handler.send_header(name, str(len(body)) if self.length else "chunked")
        handler.end_headers()
        whole = len(body)
        if self.cut:
            body = body[: self.cut.pop(0)]
        if self.length:
            handler.wfile.write(body)
        else:
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
            if len(body) == whole:
                handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    @staticmethod
    def refuse(handler: BaseHTTPRequestHandler, status: int, **headers: str) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()

    def ranges_asked(self) -> list[str]:
        return [request.get("Range", "") for request in self.requests]


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    state = WebServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(pretrained, "PAUSE", 0.001)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


NAME = "rf-detr-nano.pth"


@pytest.fixture
def publish(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Make the published table name the local server, and the MD5 of what it is called with."""

    def change(body: bytes) -> None:
        md5 = hashlib.md5(body).hexdigest()
        monkeypatch.setitem(PUBLISHED, NAME, PublishedFile(NAME, f"{web.url}/nano/best.pth", md5))

    return change


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def nowhere() -> str:
    """An address where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


# The table


def test_the_published_table() -> None:
    assert len(PUBLISHED) == 16
    assert all(name == file.name and len(bytes.fromhex(file.md5)) == 16 for name, file in PUBLISHED.items())
    assert all(file.url.startswith("https://") for file in PUBLISHED.values())
    assert len({file.md5 for file in PUBLISHED.values()}) == len({file.url for file in PUBLISHED.values()}) == 16


def test_sources_are_known_without_torch() -> None:
    script = "import sys, rfdetr_core.pretrained; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


# Local files


def test_a_path_is_taken_as_it_is(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    for source in (path, str(path), path.as_uri(), "mine.pth", "./mine.pth"):
        assert fetch_weights(source, cache=cache) == path
    assert not cache.exists()


def test_a_missing_path(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(MissingObjectError, match=r"mine\.pth: no such file \(check the path\)"):
        fetch_weights(tmp_path / "mine.pth", cache=cache)
    with pytest.raises(MissingObjectError, match=r"give its bare name, rf-detr-nano\.pth"):
        fetch_weights(tmp_path / NAME, cache=cache)


def test_a_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "models", "models"):
        with pytest.raises(MissingObjectError, match=r"models: is a folder \(give the path of a file in it\)"):
            fetch_weights(source, cache=cache)


def test_a_name_that_nobody_publishes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MissingObjectError, match=rf"neither in the current folder nor in {cache}.*rf-detr-nano\.pth"
    ) as e:
        fetch_weights("rf-detr-mini.pth", cache=cache)
    assert "seg" not in str(e.value) and "keypoint" not in str(e.value)  # they could not be loaded


def test_a_file_of_the_cache_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    (cache / "mine.pth").write_bytes(b"cached")
    monkeypatch.chdir(tmp_path)
    assert fetch_weights("mine.pth", cache=cache) == cache / "mine.pth"
    (tmp_path / "mine.pth").write_bytes(b"here")
    assert fetch_weights("mine.pth", cache=cache) == tmp_path / "mine.pth"


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("RF_HOME", raising=False)
    monkeypatch.delenv("ROBOFLOW_HOME", raising=False)
    assert cache_folder() == Path("/home/someone/.roboflow/models")
    monkeypatch.setenv("ROBOFLOW_HOME", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.setenv("RF_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.pth").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert fetch_weights("mine.pth") == tmp_path / "b" / "mine.pth"
    monkeypatch.setenv("RF_HOME", "s3://bucket/cache")
    with pytest.raises(ConfigError, match="set RF_HOME to a local folder"):
        cache_folder()


def test_a_users_own_file_under_a_published_name(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(b"my own")
    with pytest.warns(UserWarning, match=r"rf-detr-nano\.pth is not the published file of that name") as caught:
        assert fetch_weights(path, cache=cache) == path
    assert len(caught) == 1


# The publisher


def test_a_published_file_is_downloaded_once(
    web: WebServer, publish: Callable[[bytes], None], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(DATA)
    monkeypatch.chdir(tmp_path)
    path = fetch_weights(NAME, cache=cache)
    assert path == cache / NAME and path.read_bytes() == DATA
    assert fetch_weights(NAME, cache=cache) == path
    assert fetch_weights(PUBLISHED[NAME].url, cache=cache) == path
    assert [request["path"] for request in web.requests] == ["/nano/best.pth"]
    assert names(cache) == {NAME}


def test_a_published_file_with_another_md5_leaves_nothing(
    web: WebServer, publish: Callable[[bytes], None], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(b"what was published")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"what arrived has MD5 .* is published; it was removed"):
        fetch_weights(NAME, cache=cache)
    assert names(cache) == set()


def test_offline_says_what_to_put_where(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED, NAME, PublishedFile(NAME, f"{nowhere()}/x.pth", "0" * 32))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pretrained, "PAUSE", 0.001)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageUnavailableError) as caught:
        fetch_weights(NAME, cache=cache)
    assert caught.value.message.endswith("/x.pth: cannot be reached: Connection refused")
    assert caught.value.hint == (
        f"put {NAME} into {cache}, or, where there is internet, bring it into the store with: "
        f"rfdetr-pipeline weights put {NAME} --root s3://..."
    )
    assert "\n" not in str(caught.value)


# The web


def fetched(web: WebServer, cache: Path) -> bytes:
    return fetch_weights(f"{web.url}/some/weights.pth", cache=cache).read_bytes()


@pytest.mark.parametrize("length", [True, False], ids=["size announced", "chunked"])
def test_a_download(length: bool, web: WebServer, cache: Path) -> None:
    web.length = length
    assert fetched(web, cache) == DATA
    assert names(cache) == {"weights.pth", "weights.pth.etag"}


@pytest.mark.parametrize("length", [True, False], ids=["size announced", "chunked"])
def test_a_connection_that_breaks_is_continued(length: bool, web: WebServer, cache: Path) -> None:
    web.cut, web.length = [1_000_000, 5], length
    assert fetched(web, cache) == DATA
    asked = web.ranges_asked()
    assert asked[0] == "" and len(asked) == 3
    positions = [int(text.removeprefix("bytes=").removesuffix("-")) for text in asked[1:]]
    assert positions == [1_000_000, 1_000_005]
    assert all(request["If-Range"] == '"v1"' for request in web.requests[1:])


def test_many_breaks_are_no_failure_while_bytes_arrive(web: WebServer, cache: Path) -> None:
    web.cut = [100_000] * 12
    assert fetched(web, cache) == DATA
    assert len(web.requests) == 13


@pytest.mark.parametrize("etag", ['"v1"', 'W/"v1"', ""])
def test_a_server_that_cannot_continue_starts_over(etag: str, web: WebServer, cache: Path) -> None:
    web.cut, web.ranges, web.etag = [1000], False, etag
    assert fetched(web, cache) == DATA
    assert len(web.requests) == 2
    assert bool(web.ranges_asked()[1]) == (etag == '"v1"')


def test_a_file_that_changes_in_between_is_not_mixed(web: WebServer, cache: Path) -> None:
    web.cut = [1000]
    other = DATA[::-1]

    def change(handler: BaseHTTPRequestHandler, send: Callable[..., None] = web.send) -> None:
        send(handler)
        web.body, web.etag = other, '"v2"'

    web.send = change  # type: ignore[method-assign]
    assert fetched(web, cache) == other
    assert web.ranges_asked() == ["", "bytes=1000-"]


def test_a_server_that_always_breaks_off_is_given_up(web: WebServer, cache: Path) -> None:
    web.cut, web.ranges = [1000] * 50, False
    with pytest.raises(StorageUnavailableError, match=r"weights\.pth: broke off after 1000 of 1280000 bytes"):
        fetched(web, cache)
    assert len(web.requests) == 1 + pretrained.ATTEMPTS


def test_the_next_call_goes_on_where_the_last_one_gave_up(web: WebServer, cache: Path) -> None:
    web.cut = [300_000, 0, 0, 0, 0]
    with pytest.raises(StorageUnavailableError):
        fetched(web, cache)
    assert {name.partition(".pth")[2] for name in names(cache)} == {".part", ".part.etag"}
    web.requests.clear()
    assert fetched(web, cache) == DATA
    assert web.ranges_asked() == ["bytes=300000-"]


def test_a_download_that_was_whole_but_not_renamed(web: WebServer, cache: Path) -> None:
    path = fetch_weights(f"{web.url}/some/weights.pth", cache=cache)
    path.rename(path.with_name("weights.pth.part"))
    path.with_name("weights.pth.etag").rename(path.with_name("weights.pth.part.etag"))
    web.requests.clear()
    assert fetched(web, cache) == DATA
    assert web.ranges_asked() == [f"bytes={len(DATA)}-"]


def test_a_part_that_is_longer_than_the_file_starts_over(web: WebServer, cache: Path) -> None:
    path = fetch_weights(f"{web.url}/some/weights.pth", cache=cache)
    path.with_name("weights.pth.part").write_bytes(DATA + b"more")
    path.with_name("weights.pth.part.etag").write_text('"v1"')
    path.unlink()
    assert fetched(web, cache) == DATA


@pytest.mark.parametrize("status", [404, 410])
def test_a_file_that_is_not_there(status: int, web: WebServer, cache: Path) -> None:
    web.status = [status]
    with pytest.raises(MissingObjectError, match=rf"no such file \(status {status}\)"):
        fetched(web, cache)
    assert len(web.requests) == 1
    assert not [file for file in cache.rglob("*") if file.is_file()]


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_refusal(status: int, web: WebServer, cache: Path) -> None:
    web.status = [status]
    with pytest.raises(StorageAccessError, match=f"refused with status {status}"):
        fetched(web, cache)
    assert len(web.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble(status: int, web: WebServer, cache: Path) -> None:
    web.status = [status, status]
    assert fetched(web, cache) == DATA
    web.status = [status] * 50
    with pytest.raises(StorageUnavailableError, match=f"answers with status {status}"):
        fetch_weights(f"{web.url}/other.pth", cache=cache)


def test_a_copy_is_used_while_the_server_has_no_other(web: WebServer, cache: Path) -> None:
    assert fetched(web, cache) == fetched(web, cache) == DATA
    assert [request.get("If-None-Match") for request in web.requests] == [None, '"v1"']
    web.body, web.etag = b"new", '"v2"'
    assert fetched(web, cache) == b"new"
    assert fetched(web, cache) == b"new"
    assert web.requests[-1]["If-None-Match"] == '"v2"'


def test_without_a_version_it_is_downloaded_each_time(web: WebServer, cache: Path) -> None:
    web.etag = ""
    assert fetched(web, cache) == DATA
    web.body = b"new"
    assert fetched(web, cache) == b"new"


def test_a_copy_is_used_when_the_server_is_gone(web: WebServer, cache: Path) -> None:
    assert fetched(web, cache) == DATA
    web.status = [503]
    with pytest.warns(UserWarning, match="answers with status 503: the copy of an earlier download is used"):
        assert fetched(web, cache) == DATA


def test_two_addresses_of_one_name_are_two_files(web: WebServer, cache: Path) -> None:
    assert fetched(web, cache) == DATA
    web.body, web.etag = b"other", '"v2"'
    other = fetch_weights(f"{web.url}/other/weights.pth", cache=cache)
    assert other.name == "weights.pth" and other.read_bytes() == b"other"
    web.etag = '"v1"'
    assert fetched(web, cache) == DATA


def test_a_redirection(web: WebServer, cache: Path) -> None:
    web.redirect = "/moved/weights.pth"
    assert fetched(web, cache) == DATA
    assert [request["path"] for request in web.requests] == ["/some/weights.pth", "/moved/weights.pth"]


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/weights.pth"])
def test_a_redirection_away_from_http(target: str, web: WebServer, cache: Path) -> None:
    web.redirect = target
    with pytest.raises(StorageAccessError):
        fetched(web, cache)
    assert not any(not name.endswith(".part") for name in names(cache))


def elsewhere(target: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        WebServer.refuse(handler, 302, Location=target)

    return answer


def test_encrypted_downloads(certificate: Path, web: WebServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with faulty_server(context) as server:
        server.answers = [ok(DATA)]
        url = f"{server.endpoint}/weights.pth"
        with pytest.raises(StorageAccessError, match=r"the server's certificate is not trusted .*SSL_CERT_FILE"):
            fetch_weights(url, cache=cache)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch_weights(url, cache=cache).read_bytes() == DATA
        # The way there was encrypted; what it leads to would not be.
        server.answers = [elsewhere(f"{web.url}/weights.pth")]
        with pytest.raises(StorageAccessError, match=r"leads to http://.*, which is not safe"):
            fetch_weights(f"{server.endpoint}/other.pth", cache=cache)
    assert web.requests == []


def test_a_server_that_hangs_up_or_falls_silent(cache: Path, web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_server() as server:
        server.answers = [hang_up]
        with pytest.raises(StorageUnavailableError, match="cannot be reached: RemoteDisconnected"):
            fetch_weights(f"{server.endpoint}/weights.pth", cache=cache)
    silence = threading.Event()

    def wait(handler: BaseHTTPRequestHandler) -> None:
        silence.wait(5)

    monkeypatch.setattr(pretrained, "TIMEOUT", 0.1)
    web.send = wait  # type: ignore[method-assign]
    with pytest.raises(StorageUnavailableError, match="cannot be reached: no answer in time"):
        fetched(web, cache)
    silence.set()


def test_two_at_once_download_once(web: WebServer, cache: Path) -> None:
    found: list[bytes] = []
    entered, go_on = threading.Event(), threading.Event()

    def wait(handler: BaseHTTPRequestHandler, send: Callable[..., None] = web.send) -> None:
        entered.set()
        assert go_on.wait(20)
        send(handler)

    web.send = wait  # type: ignore[method-assign]
    first, second = (threading.Thread(target=lambda: found.append(fetched(web, cache))) for _ in range(2))
    first.start()
    assert entered.wait(20)
    second.start()
    second.join(0.3)  # it stands before the lock by now, or will find the file
    go_on.set()
    first.join(20)
    second.join(20)
    assert found == [DATA, DATA]
    assert len([request for request in web.requests if "If-None-Match" not in request]) == 1


@pytest.mark.parametrize("url", ["https://", "http:///weights.pth", "http://[::1/weights.pth", "https://example.org/"])
def test_an_address_that_is_none(url: str, cache: Path) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        fetch_weights(url, cache=cache)


def test_another_protocol(cache: Path) -> None:
    with pytest.raises(ConfigError):
        fetch_weights("gs://bucket/weights.pth", cache=cache)


@pytest.mark.parametrize("status", [404, 403, 503])
def test_signatures_stay_out_of_messages(
    status: int, web: WebServer, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    web.status = [status] * 50
    with pytest.raises(RFDETRError) as caught:
        fetch_weights(f"{web.url}/weights.pth?X-Amz-Signature=secret", cache=cache)
    assert f"{web.url}/weights.pth" in str(caught.value) and f"{web.url}/weights.pth" in caplog.text
    assert "secret" not in str(caught.value) + caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@HOST/weights.pth",
        "https://user:secret@HOST/weights.pth?x=1#y",
        "HTTP://secret@HOST/weights.pth",
        "http://user:sec@ret@HOST/weights.pth",
        "http://user:se/secret@HOST/weights.pth",
        "https:/user:secret@HOST/weights.pth",
        "http://user:secret@HOST",
        "ftp://user:secret@HOST/weights.pth",
        "s3://user:secret@bucket/weights.pth",
    ],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(
    url: str, web: WebServer, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigError, match="the address of the weights") as caught:
        fetch_weights(url.replace("HOST", web.url.removeprefix("http://")), cache=cache)
    assert not any(word in str(caught.value) + caplog.text for word in ("secret", "user:", "ret@"))
    assert web.requests == [] and names(cache) == set()


def test_a_password_in_a_redirection_is_not_repeated(web: WebServer, cache: Path) -> None:
    web.redirect = "ftp://user:secret@127.0.0.1/weights.pth"
    with pytest.raises(StorageAccessError, match=r"leads to ftp://127\.0\.0\.1/weights\.pth, which is not safe"):
        fetched(web, cache)


def test_an_at_sign_elsewhere_is_no_password(web: WebServer, cache: Path, tmp_path: Path) -> None:
    assert fetch_weights(f"{web.url}/models@v1/weights@2.pth", cache=cache).read_bytes() == DATA
    (tmp_path / "weights@2.pth").write_bytes(DATA)
    assert fetch_weights(f"file://{tmp_path}/weights@2.pth", cache=cache) == tmp_path / "weights@2.pth"


def test_a_cache_folder_that_cannot_be_made(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageAccessError, match="cannot write"):
        fetched(web, tmp_path / "cache")


# S3


def test_weights_in_s3_are_fetched_once(s3_root: Location, cache: Path) -> None:
    place = s3_root / "weights.pth"
    place.write_bytes(DATA)
    path = fetch_weights(place.uri, cache=cache)
    assert path.name == "weights.pth" and path.read_bytes() == DATA
    before = path.stat()
    assert fetch_weights(place.uri, cache=cache) == path
    assert os.path.samestat(path.stat(), before)


def test_replaced_weights_in_s3_are_fetched_anew(s3_root: Location, cache: Path) -> None:
    place = s3_root / "weights.pth"
    place.write_bytes(b"first")
    assert fetch_weights(place.uri, cache=cache).read_bytes() == b"first"
    place.write_bytes(b"other")  # of equal size
    assert fetch_weights(place.uri, cache=cache).read_bytes() == b"other"


def test_weights_that_are_not_in_s3(s3_root: Location, cache: Path) -> None:
    with pytest.raises(MissingObjectError, match="no such file"):
        fetch_weights((s3_root / "weights.pth").uri, cache=cache)
    with pytest.raises(ConfigError):
        fetch_weights("s3://tests", cache=cache)


@pytest.mark.parametrize("store", ["s3", "local"])
def test_weights_are_put_into_the_store_once(store: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root: Location = request.getfixturevalue("s3_root") if store == "s3" else location(str(tmp_path / "store"))
    path = tmp_path / "mine.pth"
    path.write_bytes(DATA)
    md5 = hashlib.md5(DATA).hexdigest()
    place, sent = store_weights(path, md5, root)
    assert sent and place == root / f"weights/{md5}/mine.pth"
    assert fetch_weights(place.uri, cache=tmp_path / "cache").read_bytes() == DATA
    assert store_weights(path, md5, root) == (place, False)
    for left in (DATA[:10], DATA[::-1]):  # as only another program can leave it, of another size and of the same
        place.write_bytes(left)
        assert store_weights(path, md5, root) == (place, True)
        assert place.read_bytes() == DATA


def test_weights_in_the_store_are_what_their_address_says(s3_root: Location, cache: Path) -> None:
    data = b"some weights"
    place = s3_root / f"weights/{hashlib.md5(data).hexdigest()}" / "own.pth"
    place.write_bytes(data)
    assert fetch_weights(place.uri, cache=cache).read_bytes() == data
    place.write_bytes(b"other weights")
    with pytest.raises(CheckpointError, match="its address names another one"):
        fetch_weights(place.uri, cache=cache)
    assert b"other weights" not in {file.read_bytes() for file in cache.rglob("*.pth")}


def test_weights_of_a_web_store_are_what_their_address_says(web: WebServer, cache: Path) -> None:
    url = f"{web.url}/weights/{hashlib.md5(DATA).hexdigest()}/own.pth"
    assert fetch_weights(url, cache=cache).read_bytes() == DATA
    web.body, web.etag = DATA[::-1], '"v2"'
    with pytest.raises(CheckpointError, match="its address names another one"):
        fetch_weights(url, cache=cache)
    assert names(cache) == set()


def test_a_published_name_from_the_web_is_remarked_on(web: WebServer, cache: Path) -> None:
    with pytest.warns(UserWarning, match="is not the published file of that name") as caught:
        fetch_weights(f"{web.url}/{NAME}", cache=cache)
    assert len(caught) == 1


def test_a_published_name_from_elsewhere_is_remarked_on(s3_root: Location, web: WebServer, cache: Path) -> None:
    (s3_root / NAME).write_bytes(b"own weights")
    with pytest.warns(UserWarning, match="is not the published file of that name"):
        fetch_weights((s3_root / NAME).uri, cache=cache)
