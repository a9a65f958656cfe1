"""Regular expressions that a job may name: ECMAScript's, and none that can hold the interpreter for ever."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler.patterns import check_pattern, compile_pattern

# What Node 20 answered to new RegExp(pattern).test(name).
ANSWERS = [
    # What people write.
    (r"\.pt$", "a/b.pt", True),
    (r"\.pt$", "a/b.pt.tmp", False),
    (r"^logs\/", "logs/a", True),
    (r"^logs\/", "old/logs/a", False),
    (r"step-\d+/.*\.(bin|json)$", "x/step-10/a/b.json", True),
    ("", "anything", True),
    # The end is the end, also before a line break.
    ("a$", "a\n", False),
    ("a$", "a", True),
    ("$", "", True),
    (r"a(?=$)", "ba", True),
    # The dot.
    ("^.$", "\n", False),
    ("^.$", "\r", False),
    ("^.$", "\u2028", False),
    ("^.$", "\u2029", False),
    ("^.$", "\x85", True),
    ("[.]", "a", False),
    # Sets.
    (r"^\s$", "\ufeff", True),
    (r"^\s$", "\u00a0", True),
    (r"^\s$", "\x1c", False),
    (r"^\s$", "\x85", False),
    (r"^\s$", "\u180e", False),
    (r"^\S$", "\x1c", True),
    (r"^[\s]$", "\ufeff", True),
    (r"^[^\s]$", "\u2003", False),
    (r"^[\S]$", "\u2003", False),
    (r"^[\S\n]$", "\n", True),
    (r"^\d$", "\u0663", False),
    (r"^[\d]$", "\u0663", False),
    (r"^\w$", "é", False),
    (r"^[\W]$", "é", True),
    (r"a\b", "aé", True),
    (r"a\B", "aé", False),
    (r"\B", "", True),
    (r"[\b]", "\x08", True),
    # Escapes.
    (r"\/\-\_\é\ ", "/-_é ", True),
    (r"\x41\u00e9\0", "Aé\0", True),
    (r"\f\n\r\t\v", "\x0c\n\r\t\x0b", True),
    (r"^[\x00-\uffff]+$", "😀", True),
    (r"[^\0-\uffff]", "😀", False),
    # Braces and brackets that stand for themselves.
    ("a{", "a{", True),
    ("a{1", "a{1", True),
    ("a{1,b}", "a{1,b}", True),
    ("a{1,b}", "a", False),
    ("{a}]", "{a}]", True),
    ("^]{2}$", "]]", True),
    ("^}{+$", "}{{", True),
    ("^a{2}$", "aa", True),
    ("^a{2,}?$", "aaa", True),
    # Classes.
    ("^[a-b-d]$", "-", True),
    ("^[a-b-d]$", "c", False),
    (r"^[a-\d]$", "-", True),
    (r"^[\d-z]$", "y", False),
    (r"^[\s-z]$", "-", True),
    ("^[+--]$", ",", True),
    ("^[-a]$", "-", True),
    ("^[a-]$", "-", True),
    ("^[&&a]$", "&", True),
    ("^[a||b]$", "|", True),
    ("^[--a]$", "A", True),
    ("^[~~]$", "~", True),
    ("^[[:alpha:]]$", "a]", True),
    ("^[[:alpha:]]$", "a", False),
    (r"^[\]^[]$", "^", True),
    # Lookarounds.
    ("^(?!tmp/)", "tmp/a", False),
    ("(?<!tmp)/a", "tmp/a", False),
    ("(?<=^a)b", "ab", True),
    ("(?<=a|b)c", "bc", True),
]

REFUSED = [
    ("(?<name>a)", "a named group, (?<name>; write (...)"),
    ("(?P<name>a)", "Python's named group, (?P<name>; write (...)"),
    ("(?P=name)", "Python's backreference, (?P=name)"),
    (r"\k<name>", r"\k; write the group out again"),
    (r"(a)\1", r"a backreference, \1; write the group out again"),
    (r"[\2]", r"a backreference, \2"),
    (r"\01", r"an octal escape, \01; write it as \xHH"),
    (r"\A", r"\A, which stands for the letter A in ECMAScript; write ^ for"),
    (r"a\Z", r"\Z, which stands for the letter Z in ECMAScript; write $ for"),
    (r"a\z", r"\z, which stands for the letter z in ECMAScript; write $ for"),
    (r"\a", r"\a, which stands for the letter a in ECMAScript; write \x07"),
    (r"\h", r"\h, which stands for the letter h in ECMAScript; write h"),
    (r"[\B]", r"\B, which stands for the letter B in ECMAScript; write B"),
    (r"\N{DASH}", r"\N, which stands for the letter N in ECMAScript; write N"),
    (r"\U0001f600", r"\U, which stands for the letter U in ECMAScript; write U"),
    (r"\cA", r"\c; write the control character as \xHH"),
    (r"\p{Lu}", r"\p{...}, which stands for the letter p in ECMAScript; list"),
    (r"\P{Lu}", r"\P{...}, which stands for the letter P in ECMAScript; list"),
    (r"\u{e9}", r"\u{...}, which stands for the letter u in ECMAScript; write four"),
    (r"\u12", r"\u, which stands for the letter u in ECMAScript; write four"),
    (r"\x4", r"\x, which stands for the letter x in ECMAScript; write two"),
    ("a[]", r"an empty class, []; write \[\]"),
    ("[]a]", r"an empty class, []; write \[\]"),
    ("[^]", r"an empty class, [^]; write [\s\S]"),
    ("a{,3}", "{,n}, which is no repetition in ECMAScript; write {0,n}"),
    ("a{,}", "{,n}, which is no repetition in ECMAScript"),
    ("a++", "a possessive quantifier, ++; write +"),
    ("a{2}+", "a possessive quantifier, {2}+; write {2}"),
    ("(?>a)", "an atomic group, (?>; write (?:...)"),
    ("(?i)a", "an inline flag, (?i); write both cases out, as in [aA]"),
    ("(?i:a)", "an inline flag, (?i:; write both cases out"),
    ("(?-i:a)", "an inline flag, (?-i:; write both cases out"),
    ("(?#a)", "a comment, (?#a); leave it out"),
    ("(a)(?(1)b|c)", "a conditional, (?(; write alternatives"),
    ("(?<=a|bc)d", "a lookbehind, (?<=...) or (?<!...), whose length varies; write one of a fixed length"),
    ("(?<!a+)d", "a lookbehind, (?<=...) or (?<!...), whose length varies"),
    ("😀", r"'\U0001f600', which is two characters in ECMAScript; write ."),
    ("[😀]", r"'\U0001f600', which is two characters in ECMAScript"),
    (r"\ud83d\ude00", r"\ud83d, half of a character; write ."),
    (r"[a-\udbff]", r"\udbff, half of a character"),
    (r"[\udc00-\uffff]", r"\udc00, half of a character"),
    ("(?=a)*", "a lookaround that is repeated; leave the quantifier out"),
    ("(?<!a)?b", "a lookaround that is repeated"),
    (
        "*.bin",
        r"* at its start, which repeats nothing; a pattern is a regular expression and no glob: for *.bin write \.bin$",
    ),
    ("?.bin", "? at its start"),
    ("{2}a", "{ at its start"),
    ("(?:){4294967294}x", "more than 10000 times"),
    ("((a{99}){99}){99}x", "more than 10000 times"),
]


@pytest.mark.parametrize(("pattern", "name", "expected"), ANSWERS)
def test_a_pattern_finds_what_it_finds_in_ecmascript(pattern: str, name: str, expected: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (compile_pattern(pattern).search(name) is not None) is expected


@pytest.mark.parametrize(("pattern", "words"), REFUSED)
def test_what_would_mean_something_else_is_refused_by_name(pattern: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        check_pattern(pattern)
    assert str(refusal.value).startswith(f"{pattern!r} ")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(a*)*$", "(a|aa)*$", "(a+?)+$", "((a+)b?)+$", "(a{1,3})+$", "(a?){30}a{30}", "(?:(?:a+))+$"),
        *("(?=(a+)+$)", "x|(a+)+$", "(a+|b){5,}$", "(?!(.*)*$)"),
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
        *(r"(\S|\s)+x", r"(.|\n)*x", "(" * 60 + ")" * 60),
    ],
)
def test_what_people_write_is_taken_and_is_quick(pattern: str) -> None:
    compiled = compile_pattern(pattern)
    began = time.monotonic()
    for name in ("a" * 255, "a1-/" * 60, "x" * 100 + "!"):
        compiled.search(name)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "[", "[a", "a**", "a|*", "(*a)", "^*", r"\b+", "a{2}{3}", "[b-a]", "a{2,1}", "\\", "[\\"),
        *("a{99999999999}", "x" * 201, "(" * 150, "(?:"),
    ],
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"is no regular expression|longer than 200"):
        check_pattern(pattern)


_PATTERNS = [row[0] for row in ANSWERS] + [row[0] for row in REFUSED]
_PIECES = [*_PATTERNS, *"".join(_PATTERNS)]


@given(
    st.text(max_size=30) | st.lists(st.sampled_from(_PIECES) | st.characters(), max_size=12).map("".join),
    st.text(max_size=20),
)
def test_any_text_is_a_pattern_or_is_refused_with_a_value_error(pattern: str, name: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled = compile_pattern(pattern)
    except ValueError:
        return
    compiled.search(name)


def test_repetitions_that_multiply_one_anothers_time_are_refused_by_name() -> None:
    for text in (
        *(
            "a.*.*.*x",
            "a.+b.*c.*d.*e",
            "[^a]*.*.*.*x",
            r"\w+\w+\w+x",
            "^.*a.*b.*c.*d",
            "a.*a.*[xy]",
            "(?:a.*|b.*)a.*[xy]",
        ),
        *(
            "a?" * 24 + "x",
            "a?" * 60 + "x",
            "a?" * 17 + "x",
            "a{0,3}" * 12 + "x",
            "(|a)" * 20 + "x",
            "(?:a|a)" * 20 + "[xy]",
        ),
        *(
            "a{0,900}a{0,900}x",
            "(?:a?)" * 20 + "x",
            "(?=" + "a?" * 20 + "x)",
            "x|" + "a?" * 20 + "x",
            "^" + "a?" * 30 + "x",
        ),
    ):
        with pytest.raises(ValueError, match=r"has repetitions that multiply one another's time") as refusal:
            compile_pattern(text)
        assert str(refusal.value).startswith(repr(text))


@pytest.mark.parametrize(
    "pattern",
    [
        *(".*/step-.*/.*bin", "[^/]+/[^/]+/[^/]+/[^/]+/x", r"\d+-\d+-\d+-\d+", ".{1,3}.{1,3}.{1,3}.{1,3}", ".*.*.*x"),
        *(
            "^a.*b.*c",
            r"model.*step.*\.bin",
            r"(\.gz)?(\.zst)?(\.b)?$",
            "a?" * 16 + "x",
            "a.*b.*c",
            r"/.*/.*\.pt$",
            r"step-\d+/.*\.(bin|json)$",
        ),
        *(
            r"\.pt.*.*.*",
            r"^[^/]*/.*/.*\.pt$",
            r"(a|b|c)(d|e)(f|g)x",
            "^a.*" + "a?" * 10 + "[xy]",
            "^.*a.*[xy]",
            "a.*[xy]",
        ),
        *(r"^(?=.*a)(?=.*b).*\.pt$", r"\w+\.x", "(ab)*x", "a" + "b?c" * 40 + "x", r"^\w+\w+[xy]", "a*b*c*d*x"),
    ],
)
def test_what_is_quick_enough_on_the_longest_names_is_taken(pattern: str) -> None:
    assert compile_pattern(pattern).flags & re.ASCII


@pytest.mark.parametrize(
    "pattern", [".*x", ".*?x", ".*.*?x|y", ".*^x", ".*$", ".*{a}x", ".*|x", ".+x", r"\.*x", ".*(?<=a)x"]
)
@pytest.mark.parametrize("name", ["", "x", "ax", "a\nx", "\nx", "y", "{a}x", "..x", "xa", "a\n"])
def test_what_is_left_out_at_the_start_changes_nothing(pattern: str, name: str) -> None:
    plain = re.compile(pattern.replace(".", r"[^\n\r\u2028\u2029]").replace(r"\[", "[").replace("$", r"\Z"))
    if pattern == r"\.*x":
        plain = re.compile(pattern)
    assert (compile_pattern(pattern).search(name) is None) is (plain.search(name) is None)
