"""How a store fails, and what a person reads then: one line, the URI, the cause, what to do, no secret."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.awsrequest import AWSRequest
from botocore.exceptions import ReadTimeoutError

from rfdetr_core.errors import (
    ConfigError,
    MissingObjectError,
    RFDETRError,
    StorageAccessError,
    StorageUnavailableError,
)
from rfdetr_core.storage import Location, location
from rfdetr_core.storage.s3_client import s3_session
from tests.storage.conftest import use_endpoint
from tests.storage.faulty_server import FaultyServer, cut_off, error, faulty_server, hang_up, ok

SECRET = "test-very-secret"
FILE = "s3://bucket/a.json"


@pytest.fixture(scope="module")
def shared_server() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        yield server


@pytest.fixture
def server(shared_server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    # One endpoint for all tests: a client takes a third of a second to make, and is made once per endpoint.
    use_endpoint(monkeypatch, shared_server.endpoint)
    shared_server.requests.clear()
    return shared_server


@pytest.fixture
def hasty_server(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    """For answers whose repetition has a test of its own."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return server


def use_endpoint_once(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    use_endpoint(monkeypatch, endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


def failure(act: Callable[[], object]) -> RFDETRError:
    with pytest.raises(RFDETRError) as caught:
        act()
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert SECRET not in text
    assert "private words" not in text
    return caught.value


# A real server


def test_wrong_secret(s3_root: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    (s3_root / "a").write_bytes(b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    found = failure((s3_root / "a").read_bytes)
    endpoint = s3_session().endpoint
    assert type(found) is StorageAccessError
    assert str(found) == (
        f"cannot read {s3_root}/a: the secret key is wrong (SignatureDoesNotMatch at {endpoint}) "
        "(check AWS_SECRET_ACCESS_KEY)"
    )


def test_unknown_key_id(s3_root: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOBODYKNOWSTHISKEYID")
    found = failure(s3_root.list_files)
    assert str(found) == (
        f"cannot list {s3_root}: the store does not know this access key id "
        f"(InvalidAccessKeyId at {s3_session().endpoint}) (check AWS_ACCESS_KEY_ID)"
    )


def test_missing_bucket(s3_root: Location, tmp_path: Path) -> None:
    nowhere = location("s3://no-such-bucket/a")
    reason = f"bucket 'no-such-bucket' does not exist at {s3_session().endpoint} (create it, or correct the URI)"
    (tmp_path / "file").write_bytes(b"1")
    acts: dict[str, Callable[[], object]] = {
        "read": nowhere.read_bytes,
        "write": lambda: nowhere.write_bytes(b"1"),
        "look for": nowhere.exists,
        "list": nowhere.list_files,
    }
    for action, act in acts.items():
        found = failure(act)
        assert type(found) is StorageAccessError
        assert str(found) == f"cannot {action} {nowhere}: {reason}"
    assert reason in str(failure(lambda: nowhere.upload_file(tmp_path / "file")))
    assert reason in str(failure(lambda: nowhere.download_file(tmp_path / "x")))


def test_missing_key(s3_root: Location) -> None:
    found = failure((s3_root / "gone").read_bytes)
    assert type(found) is MissingObjectError
    assert str(found) == f"cannot read {s3_root}/gone: no such file (check the URI)"


# No server


def test_dead_endpoint_is_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        use_endpoint(monkeypatch, endpoint)
        start = time.monotonic()
        found = failure(location(FILE).read_bytes)
    assert time.monotonic() - start < 10
    assert type(found) is StorageUnavailableError
    assert str(found) == (f"cannot read {FILE}: {endpoint} cannot be reached (check AWS_ENDPOINT_URL and the network)")


def test_silent_endpoint_is_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        # A listener whose queue is full drops further requests to connect, as a firewall does.
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        use_endpoint_once(monkeypatch, endpoint)
        start = time.monotonic()
        found = failure(location(FILE).read_bytes)
    assert 2 < time.monotonic() - start < 8  # times three attempts: about ten seconds
    assert type(found) is StorageUnavailableError
    assert f"{endpoint} does not answer in time" in str(found)


def test_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint_once(monkeypatch, "http://user:test-very-secret@no-such-host.invalid:9000")
    found = failure(location(FILE).read_bytes)
    assert type(found) is StorageUnavailableError
    assert (
        found.message == f"cannot read {FILE}: http://no-such-host.invalid:9000 cannot be reached: its name is unknown"
    )


def test_dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint_once(monkeypatch, "http://store.invalid")
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{SECRET}@127.0.0.1:1")
    found = failure(location(FILE).read_bytes)
    assert type(found) is StorageUnavailableError
    assert found.message == f"cannot read {FILE}: http://store.invalid cannot be reached through the proxy"


# A server that answers badly


@pytest.mark.parametrize(
    ("status", "code", "kind", "text"),
    [
        (403, "AccessDenied", StorageAccessError, "access denied (AccessDenied at "),
        (401, "Unauthorized", StorageAccessError, "access denied (Unauthorized at "),
        (400, "ExpiredToken", StorageAccessError, "the session token has expired (ExpiredToken at "),
        (400, "InvalidToken", StorageAccessError, "the session token is wrong (InvalidToken at "),
        (403, "RequestTimeTooSkewed", StorageAccessError, "this machine's clock differs from the store's"),
        (301, "PermanentRedirect", StorageAccessError, "the bucket is in another region"),
        (400, "AuthorizationHeaderMalformed", StorageAccessError, "the bucket is in another region"),
        (400, "InvalidRequest", StorageAccessError, "refused with InvalidRequest at "),
        (500, "InternalError", StorageUnavailableError, "is overloaded or failing (InternalError)"),
        (502, "", StorageUnavailableError, "does not answer like an S3 store (status 502)"),
        (503, "SlowDown", StorageUnavailableError, "is overloaded or failing (SlowDown)"),
        (400, "RequestTimeout", StorageUnavailableError, "is overloaded or failing (RequestTimeout)"),
        (429, "TooManyRequests", StorageUnavailableError, "is overloaded or failing (TooManyRequests)"),
        (507, "XMinioStorageFull", StorageUnavailableError, "is overloaded or failing (XMinioStorageFull)"),
    ],
)
def test_refusals_and_failures(
    hasty_server: FaultyServer, status: int, code: str, kind: type[Exception], text: str
) -> None:
    hasty_server.answers = [error(status, code)]
    for act in (location(FILE).read_bytes, lambda: location(FILE).write_bytes(b"1"), location(FILE).list_files):
        found = failure(act)
        assert type(found) is kind
        assert FILE in str(found)
        assert text in str(found)
        assert hasty_server.endpoint in str(found)
        assert found.hint


def test_a_failure_that_passes_is_not_noticed(server: FaultyServer) -> None:
    server.answers = [error(503, "SlowDown"), hang_up, ok(b"whole")]
    assert location(FILE).read_bytes() == b"whole"
    assert len(server.requests) == 3


def test_a_failure_that_stays_is_given_up(server: FaultyServer) -> None:
    server.answers = [error(500, "InternalError")]
    assert type(failure(location(FILE).read_bytes)) is StorageUnavailableError
    assert len(server.requests) == 3


def test_a_connection_that_breaks(hasty_server: FaultyServer) -> None:
    hasty_server.answers = [hang_up]
    found = failure(location(FILE).read_bytes)
    assert type(found) is StorageUnavailableError
    assert f"{hasty_server.endpoint} broke off (ConnectionClosedError)" in str(found)


@pytest.mark.parametrize("method", ["read_bytes", "read_versioned", "digest_file", "download_file"])
def test_a_body_that_breaks_off_is_asked_for_again(server: FaultyServer, tmp_path: Path, method: str) -> None:
    target = tmp_path / "copy"
    act = getattr(location(FILE), method)
    arguments = [target] if method == "download_file" else []
    server.answers = [cut_off(b"who", 5), ok(b"whole")]
    result = act(*arguments)
    assert result in (b"whole", (b"whole", '"etag"')) or result.size == 5
    server.answers = [cut_off(b"who", 5)]
    found = failure(lambda: act(*arguments))
    assert type(found) is StorageUnavailableError
    assert "broke off" in str(found)
    assert len(server.requests) == 2 + 3
    if method == "download_file":
        assert target.read_bytes() == b"whole"
        assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_large_body_that_breaks_off_leaves_nothing(server: FaultyServer, tmp_path: Path) -> None:
    server.answers = [cut_off(b"x" * 1000, 9 * 2**20)]
    found = failure(lambda: location(FILE).download_file(tmp_path / "copy"))
    assert type(found) is StorageUnavailableError
    assert [*tmp_path.iterdir()] == []


def test_a_read_timeout(server: FaultyServer) -> None:
    """Injected: the real one takes a minute."""

    def time_out(request: AWSRequest, **_: object) -> None:
        raise ReadTimeoutError(endpoint_url=f"http://user:{SECRET}@host")

    server.answers = [ok(b"whole")]
    client = s3_session().client
    client.meta.events.register("before-send.s3.GetObject", time_out)
    try:
        found = failure(location(FILE).read_bytes)
    finally:
        client.meta.events.unregister("before-send.s3.GetObject", time_out)
    assert type(found) is StorageUnavailableError
    assert f"{server.endpoint} does not answer in time" in str(found)


def test_an_object_replaced_while_it_is_read(moto_root: Location, tmp_path: Path) -> None:
    """Parts of two versions never make one file."""
    file = moto_root / "large"
    file.write_bytes(b"1" * 20 * 2**20)
    replaced = False

    def replace(**_: object) -> None:
        nonlocal replaced
        if not replaced:
            replaced = True
            file.write_bytes(b"2" * 20 * 2**20)

    client = s3_session().client
    client.meta.events.register("after-call.s3.GetObject", replace)
    try:
        try:
            digest = file.download_file(tmp_path / "copy")
        except StorageUnavailableError as found:
            assert "it was replaced meanwhile (try again)" in str(found)
            assert [*tmp_path.iterdir()] == []
        else:
            data = (tmp_path / "copy").read_bytes()
            assert set(data) in ({ord("1")}, {ord("2")})
            assert digest.size == len(data) == 20 * 2**20
    finally:
        client.meta.events.unregister("after-call.s3.GetObject", replace)
    assert replaced


def test_what_is_no_s3_store(hasty_server: FaultyServer) -> None:
    hasty_server.answers = [ok(b"<html>welcome</html", **{"Content-Type": "text/html"})]
    found = failure(location(FILE).list_files)
    assert type(found) is StorageUnavailableError
    assert f"{hasty_server.endpoint} does not answer like an S3 store (status 500)" in str(found)


def test_keys_that_are_no_file_names(moto_root: Location, tmp_path: Path) -> None:
    client, bucket = s3_session().client, moto_root.uri.split("/")[2]
    prefix = moto_root.name
    client.put_object(Bucket=bucket, Key=f"{prefix}/d/", Body=b"")
    client.put_object(Bucket=bucket, Key=f"{prefix}/d/file", Body=b"1")
    assert [info.name for info in moto_root.list_files()] == ["d/file"]
    for key in ("a//b", "d/full/", "a/../../b"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=b"1")
        with pytest.raises(ConfigError, match="is no legal name below"):
            moto_root.download_tree(tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
        client.delete_object(Bucket=bucket, Key=f"{prefix}/{key}")
    client.put_object(Bucket=bucket, Key=f"{prefix}/a//b", Body=b"1")
    moto_root.delete_tree()
    assert "Contents" not in client.list_objects_v2(Bucket=bucket, Prefix=prefix)


def test_a_batch_that_is_deleted_in_part(hasty_server: FaultyServer) -> None:
    failed = b"<Error><Key>a</Key><Code>AccessDenied</Code><Message>private words</Message></Error>"
    body = b"<DeleteResult>" + failed + b"</DeleteResult>"
    hasty_server.answers = [ok(body)]
    found = failure(lambda: location("s3://bucket/a").delete_files(["x", "y"]))
    assert found.message == f"cannot delete s3://bucket/a: access denied (AccessDenied at {hasty_server.endpoint})"


# Certificates


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Key and self-signed certificate of 127.0.0.1 in one file."""
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path / "server.pem"
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


def test_certificates(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with faulty_server(context) as server:
        server.answers = [ok(b"whole")]
        use_endpoint_once(monkeypatch, server.endpoint)
        found = failure(location(FILE).read_bytes)
        assert type(found) is StorageAccessError
        assert str(found) == (
            f"cannot read {FILE}: the certificate of {server.endpoint} is not trusted "
            "(set AWS_CA_BUNDLE to the file with its certificate authority)"
        )
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        assert location(FILE).read_bytes() == b"whole"
