"""Which provider's rules the server enforces: Cloudflare R2's, all of them, unless told otherwise."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_type_hints

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Rules:
    """What the server insists on. Every rule is on by default; each can be switched off alone."""

    equal_parts: bool = True
    """All parts of a multipart upload but the last have one size, and the last is not larger (R2)."""
    min_part_size: int = 5 * MIB
    """Bytes that every part but the last must have at least (S3 and R2)."""
    max_parts: int = 10_000
    """The highest part number."""
    write_interval: float = 1.0
    """Seconds between two writes of one key (R2: one a second, else 429). 0 allows any rate."""
    write_limit_code: str = "TooManyRequests"
    """The S3 code of that 429; `SlowDown` is the other one seen in the field."""
    conditional_put: bool = True
    """If-Match and If-None-Match are honoured on PutObject; off: ignored in silence, as poor providers do."""
    conditional_complete: bool = True
    """The same for CompleteMultipartUpload."""
    conditional_part_copy: bool = False
    """x-amz-copy-source-if-* is honoured on UploadPartCopy (R2: it is not)."""
    if_match_missing: int = 404
    """Status of If-Match on a key that does not exist: 404 NoSuchKey as on S3, or 412."""
    ranges: bool = True
    """Range is honoured; off answers 200 with the whole object, as `rclone serve s3` does."""
    verify_signature: bool = True
    """SigV4 is checked: access key, signature, signed headers, clock."""
    max_clock_skew: float = 900.0
    """Seconds that x-amz-date may be off."""
    verify_digests: bool = True
    """Content-MD5, x-amz-content-sha256 and x-amz-checksum-* are checked against the body."""
    answer_continue: bool = True
    """`Expect: 100-continue` is answered by `100 Continue`; off answers nothing until the body has come."""
    opaque_etags: bool = False
    """ETags are unique names instead of MD5s: cheaper, and finds who takes an ETag for an MD5."""
    keep_history: bool = False
    """Every version of every key is kept, for `history()`."""
    log_headers: bool = False
    """The log of requests keeps their headers (never `authorization`)."""

    @classmethod
    def lenient(cls, **changes: bool | float | str) -> Rules:
        """S3 as it was without R2's own limits: any part sizes, any rate of writes."""
        return cls().but(**{"equal_parts": False, "min_part_size": 0, "write_interval": 0.0, **changes})

    def but(self, **changes: bool | float | str) -> Rules:
        """These rules with some changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def with_texts(self, texts: list[str]) -> Rules:
        """These rules with `name=value` texts of a command line applied.

        Raises:
            ValueError: a name is unknown or a value does not fit it.
        """
        kinds = get_type_hints(Rules)
        changes: dict[str, bool | float | str] = {}
        for text in texts:
            name, _, value = text.partition("=")
            kind = kinds.get(name)
            if kind is None:
                raise ValueError(f"no rule is called {name!r}; the rules are {', '.join(sorted(kinds))}")
            if kind is bool:
                if value not in ("true", "false"):
                    raise ValueError(f"rule {name} is true or false, not {value!r}")
                changes[name] = value == "true"
            else:
                changes[name] = kind(value)
        return self.but(**changes)
