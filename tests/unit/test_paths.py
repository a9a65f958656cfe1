"""Keys become paths inside a folder, or are refused by name."""

from __future__ import annotations

import os.path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from heeler_sync.errors import BadLocationError, UnsafeKeyError
from heeler_sync.paths import is_own, location, parse_location, relative_path

ROOT = "/data/job"

# Texts built from what could lead astray, and any text at all.
PARTS = st.sampled_from(["..", ".", "", "a", "b.pt", "...", "..a", "\0", "~", "ü", "-", " ", "a\nb", "\\", "x" * 256])
KEYS = st.one_of(st.text(max_size=40), st.lists(PARTS, max_size=5).map("/".join))


@given(KEYS, st.sampled_from(["", "p/", "p/q/"]))
@example("..", "")
@example("a/../../b", "")
@example("//etc/passwd", "p/")
@example("/etc/passwd", "p/")
def test_a_key_stays_inside_its_folder_or_is_refused(rest: str, prefix: str) -> None:
    key = prefix + rest
    try:
        relative = relative_path(key, prefix)
    except UnsafeKeyError:
        return
    path = os.path.normpath(f"{ROOT}/{relative}")
    assert path.startswith(ROOT + "/")
    assert "\0" not in path
    assert path == f"{ROOT}/{relative}", "normalizing must change nothing, or two keys would be one file"
    assert location("bucket", prefix).key(relative) == key
    assert all(len(os.fsencode(part)) <= 255 for part in relative.split("/"))


@pytest.mark.parametrize(
    "key",
    [
        "../x",
        "a/../x",
        "a/..",
        "..",
        ".",
        "a/./b",
        "/etc/passwd",
        "a//b",
        "a/",
        "",
        "a\0b",
        "a/b\0",
        "x" * 256,
        "é" * 128,
    ],
)
def test_dangerous_keys_are_refused(key: str) -> None:
    with pytest.raises(UnsafeKeyError) as caught:
        relative_path("p/" + key, "p/")
    assert caught.value.key == "p/" + key
    assert repr("p/" + key) in str(caught.value)


@pytest.mark.parametrize(
    "key", ["a", "a/b/c.pt", "..a", "a..", "...", ".hidden", "a b", "ü/日本", "x" * 255, "-rf", "~"]
)
def test_plain_keys_are_taken_as_they_are(key: str) -> None:
    assert relative_path("p/" + key, "p/") == key


def test_a_key_of_another_prefix_is_refused() -> None:
    with pytest.raises(UnsafeKeyError, match="not below"):
        relative_path("pq/a", "p/")


@pytest.mark.parametrize(
    ("url", "bucket", "prefix"),
    [
        ("s3://bucket/a/b/", "bucket", "a/b/"),
        ("s3://bucket/a/b", "bucket", "a/b/"),
        ("s3://bucket/", "bucket", ""),
        ("s3://bucket", "bucket", ""),
        ("s3://my.bucket-1/a b/ü/", "my.bucket-1", "a b/ü/"),
    ],
)
def test_an_address_is_parsed(url: str, bucket: str, prefix: str) -> None:
    found = parse_location(url)
    assert (found.bucket, found.prefix) == (bucket, prefix)


@pytest.mark.parametrize(
    "url",
    ["bucket/a", "http://bucket/a", "s3:/bucket", "s3://", "s3:///a", "s3://b", "s3://bucket/a//b/", "s3://bucket/../a/",
     "s3://bucket/a/./b", "s3://bu cket/a", "s3://-bucket/", "s3://bucket\n/"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(BadLocationError):
        parse_location(url)


@given(st.text(min_size=1, max_size=30))
def test_a_location_shows_itself_as_it_was_given(prefix: str) -> None:
    try:
        found = location("bucket", prefix)
    except BadLocationError:
        return
    assert found.prefix == "" or found.prefix.endswith("/")
    assert parse_location(str(found)) == found


def test_heelers_own_folder_is_known_at_any_depth_and_nothing_else_is() -> None:
    assert is_own(".heeler")
    assert is_own(".heeler/incoming/x")
    assert is_own("a/.heeler/x")
    assert not is_own("a.heeler")
    assert not is_own(".heeler2/x")
