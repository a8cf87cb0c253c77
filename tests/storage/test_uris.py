"""What is a URI and what is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfdetr_core.errors import ConfigError
from rfdetr_core.storage import Location, location

PARTS = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="/"), min_size=1, max_size=12
).filter(lambda part: part not in (".", ".."))
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
BUCKETS = st.from_regex(r"[a-z0-9][a-z0-9-]{1,30}[a-z0-9]", fullmatch=True)


@given(BUCKETS, NAMES, NAMES)
def test_s3_uris_join_and_come_back(bucket: str, prefix: str, name: str) -> None:
    joined = location(f"s3://{bucket}/{prefix}") / name
    assert joined.uri == f"s3://{bucket}/{prefix}/{name}"
    assert location(joined.uri) == joined == location(joined.uri + "/")
    assert joined.name == name.split("/")[-1]
    assert joined.local_path is None


@given(NAMES, NAMES)
def test_paths_join_and_come_back(folder: str, name: str) -> None:
    joined = location(f"/{folder}") / name
    assert joined.uri == f"/{folder}/{name}"
    assert location(joined.uri) == joined == location(Path(joined.uri).as_uri())
    assert joined.local_path == Path(f"/{folder}/{name}")


@given(st.lists(st.sampled_from(["a", "b", ".", "..", ""]), max_size=5).map("/".join))
def test_nothing_joined_leaves_its_root(name: str) -> None:
    for root in (location("s3://bucket/root"), location("/data/root")):
        try:
            joined = root / name
        except ConfigError:
            continue
        assert joined.uri == os.path.normpath(joined.uri.replace("s3://", "s3:/")).replace("s3:/", "s3://")
        assert joined.uri.startswith(root.uri + "/")


@given(st.text(max_size=20))
def test_any_text_is_a_location_or_a_config_error(text: str) -> None:
    for uri in (text, f"s3://{text}", f"s3://bucket/{text}", f"file://{text}"):
        try:
            found = location(uri)
        except ConfigError as error:
            assert "\n" not in str(error)
            continue
        assert location(found.uri) == found
        assert "\n" not in found.uri


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "'' is no legal URI (for example s3://bucket/prefix, file:///folder or a path)"),
        ("a\nb", "'a\\nb' is no legal URI"),
        ("s3:/x", "'s3:/x' names no bucket (for example s3://bucket/prefix)"),
        ("s3:x", "'s3:x' names no bucket"),
        ("s3://", "'s3://' names no bucket"),
        ("s3:///x", "'s3:///x' names no bucket"),
        ("s3://../x", "'s3://../x' names no bucket"),
        ("s3://a..b/x", "'s3://a..b/x' names no bucket"),
        ("s3://user:pw@host/x", "'s3://user:pw@host/x' names no bucket"),
        ("s3://bucket/a//b/../c", "has an empty, '.' or '..' part (for example s3://bucket/a/b/c)"),
        ("s3://bucket//a", "has an empty, '.' or '..' part (for example s3://bucket/a)"),
        ("gs://bucket/x", "'gs://bucket/x': storage in 'gs' is not supported (for example s3://bucket/prefix"),
        ("https://host/x", "storage in 'https' is not supported"),
        ("hdfs:/x", "storage in 'hdfs' is not supported"),
        ("file:x", "'file:x' is no absolute path on this machine (for example file:///data/models)"),
        ("file://host/x", "'file://host/x' is no absolute path on this machine"),
        ("file:///a%0Ab", "is no absolute path on this machine"),
    ],
)
def test_what_is_no_uri_is_refused_with_an_example(uri: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        location(uri)
    assert message in str(caught.value)


def test_forms_of_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    forms: dict[str, str] = {
        "s3://bucket": "s3://bucket",
        "s3://bucket/": "s3://bucket",
        "S3://bucket/a/b/": "s3://bucket/a/b",
        "s3://My_Bucket.v1/a b?c#d%20": "s3://My_Bucket.v1/a b?c#d%20",
        "runs/r1": f"{tmp_path}/runs/r1",
        "./runs//r1/": f"{tmp_path}/runs/r1",
        "other/../runs": f"{tmp_path}/runs",
        "name:1": f"{tmp_path}/name:1",
        "/data": "/data",
        "file:///data/a%20b": "/data/a b",
        "~/data": f"{tmp_path}/home/data",
    }
    assert {form: location(form).uri for form in forms} == forms


def test_a_bucket_is_no_file_and_not_to_be_emptied() -> None:
    bucket = location("s3://bucket")
    assert (bucket.name, (bucket / "a").uri) == ("bucket", "s3://bucket/a")
    for act in (bucket.read_bytes, bucket.delete, lambda: bucket.write_bytes(b"")):
        with pytest.raises(ConfigError, match="s3://bucket is a bucket, and a file is wanted"):
            act()
    for root in (bucket, location("/")):
        with pytest.raises(ConfigError, match="refusing to delete all of"):
            root.delete_tree()


def test_a_location_is_a_value() -> None:
    place: Location = location("s3://bucket/a")
    with pytest.raises(AttributeError):
        place.key = "b"  # type: ignore[attr-defined]


def test_importing_and_local_folders_need_no_boto3(tmp_path: Path) -> None:
    program = """
import sys
import rfdetr_core.publication
from rfdetr_core.storage import location
root = location(sys.argv[1])
(root / "a.json").write_json({})
assert root.list_files() and location("s3://bucket/x").uri
assert not {"boto3", "botocore", "s3transfer", "torch", "tqdm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
