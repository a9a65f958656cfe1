"""Regular expressions of ECMAScript written for Python's engine.

What both know and mean differently is rewritten; what can't be is refused by name, with what to write instead.
"""

from __future__ import annotations

import re
from typing import NoReturn

_ANY = r"\x00-\x09\x0b\x0c\x0e-\u2027\u202a-\U0010ffff"
_SPACE = r"\t-\r\x20\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_NO_SPACE = (
    r"\x00-\x08\x0e-\x1f!-\x9f\xa1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff"
    r"\u3001-\ufefe\uff00-\U0010ffff"
)
_BEYOND = r"\U00010000-\U0010ffff"
_SETS = {"d": r"\d", "D": r"\D", "w": r"\w", "W": r"\W", "s": _SPACE, "S": _NO_SPACE}
_CONTROLS = {"f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_LOOKS = ("(?=", "(?!", "(?<=", "(?<!")
_BRACES = re.compile(r"\{(?:[0-9]+(?:,[0-9]*)?)\}")
_HEX = {"x": re.compile("[0-9A-Fa-f]{2}"), "u": re.compile("[0-9A-Fa-f]{4}")}
_FIRST_HALF, _LAST_HALF = 0xD800, 0xDFFF
_LAST_WHOLE = 0xFFFF

_KNOWN = {
    "c": r"write the control character as \xHH",
    "k": "write the group out again",
}
_INSTEAD = {
    "A": "write ^ for the start of the path",
    "Z": "write $ for the end of the path",
    "z": "write $ for the end of the path",
    "a": r"write \x07 for the bell, a for the letter",
    "p": "list the characters in a class, as in [a-z]",
    "P": "list the characters in a class, as in [^a-z]",
    "x": r"write two hexadecimal digits, as in \x2f",
    "u": r"write four hexadecimal digits, as in \u00e9",
}
_GROUP = re.compile(r"\(\?[^():>]*[:>)]")
_GROUPS = (
    ("(?P=", "Python's backreference", "write the group out again"),
    ("(?P", "Python's named group", "write (...) without the name"),
    ("(?<", "a named group", "write (...) without the name"),
    ("(?#", "a comment", "leave it out"),
    ("(?>", "an atomic group", "write (?:...)"),
    ("(?(", "a conditional", "write alternatives with |"),
    ("(?", "an inline flag", "write both cases out, as in [aA]"),
)


def translate(text: str) -> str:
    """A pattern of ECMAScript, without flags, as Python's engine takes it under `re.ASCII`.

    Raises:
        ValueError: It is none, or holds a construct, which is named, that would mean something else.
    """
    return _Translation(text).whole()


class _Translation:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._out: list[str] = []
        self._open: list[str] = []
        self._last = ""
        """What a quantifier would repeat: "atom", "look" or "anchor"; "" for nothing."""

    def whole(self) -> str:
        """The translated pattern; raises `ValueError`."""
        beyond = next((c for c in self._text if ord(c) > _LAST_WHOLE or _is_half(ord(c))), None)
        if beyond is not None:
            self._refuse(f"{beyond!a}, which is two characters in ECMAScript", "write . or .* in its place")
        while self._at < len(self._text):
            self._one()
        if self._open:
            _broken("a ( is not closed")
        return "".join(self._out)

    def _one(self) -> None:
        character = self._text[self._at]
        if character in "*+?{" and self._quantifier(character):
            return
        self._at += 1
        if character == "(":
            self._group()
        elif character == ")":
            if not self._open:
                _broken("a ) closes nothing")
            self._put(")", self._open.pop())
        elif character == "|":
            self._put("|", "")
        elif character == "[":
            self._class()
        elif character == "\\":
            self._escape()
        elif character in "^$":
            self._put("^" if character == "^" else r"\Z", "anchor")
        else:
            self._put(f"[{_ANY}]" if character == "." else re.escape(character), "atom")

    def _put(self, translated: str, last: str) -> None:
        self._out.append(translated)
        self._last = last

    def _quantifier(self, character: str) -> bool:
        """Take one in; False for a { that stands for itself."""
        if character == "{":
            found = _BRACES.match(self._text, self._at)
            if found is None:
                if re.match(r"\{,[0-9]*\}", self._text[self._at :]):
                    self._refuse("{,n}, which is no repetition in ECMAScript", r"write {0,n}, or \{ for the brace")
                return False
            quantifier = found[0]
        else:
            quantifier = character
        if not self._last:
            if self._at == 0:
                self._refuse(
                    f"{character} at its start, which repeats nothing",
                    r"a pattern is a regular expression and no glob: for *.bin write \.bin$",
                )
            _broken(f"nothing to repeat at position {self._at}")
        if self._last == "look":
            self._refuse("a lookaround that is repeated", "leave the quantifier out")
        if self._last != "atom":
            _broken(f"nothing to repeat at position {self._at}")
        self._at += len(quantifier)
        following = self._text[self._at : self._at + 1]
        if following == "+":
            self._refuse(f"a possessive quantifier, {quantifier}+", f"write {quantifier}")
        if following == "?":
            self._at += 1
            quantifier += "?"
        self._put(quantifier, "")
        return True

    def _group(self) -> None:
        rest = self._text[self._at - 1 : self._at + 3]
        look = next((look for look in _LOOKS if rest.startswith(look)), None)
        if look is not None:
            opening = look
        elif rest.startswith("(?:"):
            opening = "(?:"
        else:
            for beginning, name, instead in _GROUPS:
                if rest.startswith(beginning):
                    whole = _GROUP.match(self._text, self._at - 1)
                    self._refuse(f"{name}, {whole[0] if whole else beginning}", instead)
            opening = "("
        self._at += len(opening) - 1
        self._open.append("atom" if look is None else "look")
        # Nothing can ask for what a group captured.
        self._put("(?:" if look is None else look, "")

    def _escape(self) -> None:
        character = self._text[self._at : self._at + 1]
        if character == "b":
            self._at += 1
            self._put(r"\b", "anchor")
        elif character == "B":
            self._at += 1
            self._put(r"(?!\b)", "anchor")  # Python's \B is not in an empty name
        else:
            found = self._escaped()
            if isinstance(found, int):
                if _is_half(found):
                    self._refuse_half(found)
                self._put(re.escape(chr(found)), "atom")
            else:
                self._put(f"[{found}]", "atom")

    def _escaped(self) -> int | str:
        """The character that is escaped, or the members of the set that is named."""
        character = self._text[self._at : self._at + 1]
        if not character:
            _broken("it ends with a backslash")
        self._at += 1
        if character in _SETS:
            return _SETS[character]
        if character in _CONTROLS:
            return ord(_CONTROLS[character])
        following = self._text[self._at : self._at + 1]
        if character in "123456789":
            self._refuse(f"a backreference, \\{character}", "write the group out again")
        if character == "0":
            if following in tuple("0123456789"):
                self._refuse(f"an octal escape, \\0{following}", r"write it as \xHH")
            return 0
        if character in _HEX:
            found = _HEX[character].match(self._text, self._at)
            if found is not None:
                self._at = found.end()
                return int(found[0], 16)
        if character.isascii() and character.isalpha():
            name = f"\\{character}" + ("{...}" if following == "{" and character in "pPu" else "")
            if character in _KNOWN:
                self._refuse(name, _KNOWN[character])
            instead = _INSTEAD.get(character, f"write {character}")
            self._refuse(f"{name}, which stands for the letter {character} in ECMAScript", instead)
        return ord(character)

    def _class(self) -> None:
        negated = self._text.startswith("^", self._at)
        self._at += negated
        if self._text.startswith("]", self._at):
            empty, instead = ("[^]", r"[\s\S] for any character") if negated else ("[]", r"\[\] for the brackets")
            self._refuse(f"an empty class, {empty}", f"write {instead}")
        members: list[str] = []
        while not self._text.startswith("]", self._at):
            low = self._member()
            # A - before the ] stands for itself.
            if not self._text.startswith("-", self._at) or self._text.startswith("]", self._at + 1):
                members.append(self._range(low, low))
                continue
            self._at += 1
            high = self._member()
            if isinstance(low, int) and isinstance(high, int):
                members.append(self._range(low, high))
            else:
                members += [self._range(low, low), r"\-", self._range(high, high)]
        self._at += 1
        self._put(f"[{'^' if negated else ''}{''.join(members)}]", "atom")

    def _member(self) -> int | str:
        character = self._text[self._at : self._at + 1]
        if not character:
            _broken("a [ is not closed")
        self._at += 1
        if character != "\\":
            return ord(character)
        if self._text.startswith("b", self._at):
            self._at += 1
            return ord("\b")
        return self._escaped()

    def _range(self, low: int | str, high: int | str) -> str:
        if isinstance(low, str) or isinstance(high, str):
            return str(low)
        if low > high:
            _broken(f"a range out of order, {chr(low)}-{chr(high)}")
        written = re.escape(chr(low)) + ("" if low == high else "-" + re.escape(chr(high)))
        if low <= _FIRST_HALF and high >= _LAST_HALF:
            return written + _BEYOND
        for end in (low, high):
            if _is_half(end):
                self._refuse_half(end)
        return written

    def _refuse_half(self, half: int) -> NoReturn:
        self._refuse(f"\\u{half:04x}, half of a character", "write . or .* in place of the whole character")

    def _refuse(self, construct: str, instead: str) -> NoReturn:
        raise ValueError(f"{self._text!r} has {construct}; {instead}")


def _is_half(code: int) -> bool:
    return _FIRST_HALF <= code <= _LAST_HALF


def _broken(reason: str) -> NoReturn:
    raise ValueError(f"is no regular expression: {reason}")
