"""The YAML reader and writer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rfdetr_core.config.yaml_text import read_scalar, read_yaml, write_yaml
from rfdetr_core.errors import ConfigError

SCALARS = [
    ("1e-4", 1e-4),
    ("1E5", 1e5),
    ("-2.5e+3", -2500.0),
    (".5", 0.5),
    ("1.", 1.0),
    ("3", 3),
    ("+3", 3),
    ("012", 12),
    ("0x1f", 31),
    ("0o17", 15),
    ("true", True),
    ("FALSE", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("off", "off"),
    ("no", "no"),
    ("yes", "yes"),
    ("1:30", "1:30"),
    ("1_000", "1_000"),
    ("2024-01-01", "2024-01-01"),
    ("NaN", "NaN"),
    ("-.inf", -math.inf),
    ("s3://bucket/key", "s3://bucket/key"),
    ("e5", "e5"),
    ("<<", "<<"),
    ("=", "="),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_plain_scalars(text: str, value: Any) -> None:
    for read in (read_yaml(text, "x"), read_scalar(text, "x"), read_yaml(f"a: {text}", "x")["a"]):
        assert read == value
        assert type(read) is type(value)
    assert read_yaml(f'"{text}"', "x") == text


def test_nan_is_read() -> None:
    assert math.isnan(read_yaml(".nan", "x"))


def test_a_scalar_is_only_a_scalar() -> None:
    for text in ("a: b", "a #b", "[1", "- a", "&a", "*a", "!t x"):
        assert read_scalar(text, "x") == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", 'line 3, column 1: duplicate key "a"'),
        ("a: {b: 1, b: 2}", 'line 1, column 11: duplicate key "b"'),
        ('a: 1\n"a": 2', 'line 2, column 1: duplicate key "a"'),
        ("a: &x 1\nb: *x", "line 2, column 4: aliases are not supported"),
        ("a: &x [*x]", "line 1, column 8: aliases are not supported"),
        ("a: [1", "line 1, column 6: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a:\n\t- 1", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream, but found another document"),
        ("1: 2", "line 1, column 1: a key must be text"),
        ("a:\n  ? [b]\n  : 1", "line 2, column 5: a key must be text"),
        ("a: !!python/name:os.system x", "line 1, column 4: the tag !!python/name:os.system is not supported"),
        ("a: !!timestamp 2024-01-01", "line 1, column 4: the tag !!timestamp is not supported"),
        ("a: !mine x", "line 1, column 4: the tag !mine is not supported"),
        ("a: !!int x", 'line 1, column 4: "x" is no whole number'),
        ("a: !!float x", 'line 1, column 4: "x" is no number'),
        ("ok: 1\na: \x00", "line 2, column 4: the character U+0000 is not allowed"),
        (b"ok: 1\na: \xc3\x28", "line 2, column 4: not UTF-8; save the file as UTF-8"),
        (b"\xff", "line 1, column 1: not UTF-8; save the file as UTF-8"),
        ("a: " + "[" * 60, "line 1, column 54: nested deeper than 50"),
    ],
)
def test_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "s3://k:secret@b/config.yaml")
    assert str(caught.value) == f"s3://***@b/config.yaml: {message}"


def test_thousands_of_digits() -> None:
    for read in (read_yaml, read_scalar):
        with pytest.raises(ConfigError, match=r"line 1, column 1: .* is no whole number"):
            read("1" * 5000, "x")


def test_byte_order_mark() -> None:
    assert read_yaml("\ufeffa: ä".encode(), "x") == {"a": "ä"}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=8,
)
# What YAML 1.1 and 1.2 read differently, and what is no text to one of them.
TRICKY = st.sampled_from(
    [*(text for text, _ in SCALARS), "1e-4", "y", "on", "0b1", "1.2.3", "- a", "a: b", "#", "'", '"', "\u2028", "\x85"]
)


@given(st.dictionaries(st.text(), PLAIN | TRICKY, max_size=5))
def test_round_trip(values: dict[str, Any]) -> None:
    text = write_yaml(values)
    assert read_yaml(text.encode(), "x") == values
    assert list(read_yaml(text, "x")) == list(values)


@given(st.dictionaries(TRICKY, TRICKY, max_size=5))
def test_other_readers_see_the_same(values: dict[str, str]) -> None:
    assert yaml.safe_load(write_yaml(values)) == values


def test_layout() -> None:
    text = write_yaml({"b": {"c": [1, 2], "a": 1e-5}, "a": "off", "e": {}, "t": "x " * 100})
    assert text == f"b:\n  c: [1, 2]\n  a: 1.0e-05\na: 'off'\ne: {{}}\nt: '{'x ' * 100}'\n"
