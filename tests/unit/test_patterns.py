"""Regular expressions that a job may name: none that can hold the interpreter for ever."""

from __future__ import annotations

import re
import time

import pytest

from heeler.patterns import check_pattern


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(a*)*$", "(a|aa)*$", "(a+?)+$", "((a+)b?)+$", "(a{1,3})+$", "(a?){30}a{30}", "(?:(?:a+))+$"),
        *("(?=(a+)+$)", "x|(a+)+$", "(?P<name>a+)+$", "(a+|b){5,}$", "(?i:(a+)+)$"),
    ],
)
def test_a_pattern_that_can_take_for_ever_is_refused(pattern: str) -> None:
    re.compile(pattern)
    with pytest.raises(ValueError, match="takes for ever"):
        check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"\.pt$", r".*\.(pt|ckpt)$", r"^[^/]+/model\.bin$", r"(\d{4}-)+x", "(a|b)+", "a+b*c?", r"^step-\d+/.*$", ""),
        *(r"(foo|bar)", "(ab)+", "(a+)?", r"(?!tmp).*", r"^(?:checkpoint|final)-\d+\.(safetensors|json)$"),
    ],
)
def test_what_people_write_is_taken_and_is_quick(pattern: str) -> None:
    check_pattern(pattern)
    began = time.monotonic()
    for name in ("a" * 255, "a1-/" * 60, "x" * 100 + "!"):
        re.compile(pattern).search(name)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("pattern", ["(", "[", "a**", "(?P<n", "\\", "x" * 201, "(" * 150])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"is no regular expression|longer than 200"):
        check_pattern(pattern)
