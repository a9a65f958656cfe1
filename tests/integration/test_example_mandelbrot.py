"""The app of `examples/mandelbrot` by itself: its tiles fit together, and what it can't render it refuses in words."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from examples.mandelbrot import run
from examples.mandelbrot.app import INSIDE, PALETTE, Tile, app, colour, render

GOOD = {"x": -2.3, "y": 1.2, "width": 3.2, "height": 2.4, "pixels": 16, "iterations": 50}


def ask(method: str, path: str, **request: Any) -> httpx.Response:
    """What the app answers, asked in this process."""

    async def answer() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            return await client.request(method, path, **request)

    return anyio.run(answer)


def post(**tile: object) -> bytes:
    """The colours that the app answers."""
    answer = ask("POST", "/tile", json=tile)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    rgb = zlib.decompress(base64.b64decode(found["rgb"]))
    assert len(rgb) == 3 * found["columns"] * found["rows"]
    return rgb


def lines(rgb: bytes, pixels: int) -> list[bytes]:
    return [rgb[at : at + 3 * pixels] for at in range(0, len(rgb), 3 * pixels)]


def beside(left: list[bytes], right: list[bytes]) -> list[bytes]:
    return [one + other for one, other in zip(left, right, strict=True)]


@pytest.mark.parametrize(
    ("x", "y", "width", "height", "pixels"),
    [
        ("-2.25", "1.125", "3", "2.25", 16),
        ("-2.3", "1.2", "3.2", "2.4", 32),
        ("-0.77", "0.13", "0.06", "0.06", 14),
        ("-1.2500000001", "0.0200000001", "0.0000000006", "0.0000000002", 30),
    ],
)
def test_a_tile_is_the_same_whole_as_in_quarters(x: str, y: str, width: str, height: str, pixels: int) -> None:
    def tile(left: Decimal, top: Decimal, parts: int) -> list[bytes]:
        size = {"width": float(Decimal(width) / parts), "height": float(Decimal(height) / parts)}
        across = pixels // parts
        return lines(post(x=float(left), y=float(top), **size, pixels=across, iterations=300), across)

    left, top = Decimal(x), Decimal(y)
    middle, centre = left + Decimal(width) / 2, top - Decimal(height) / 2
    upper = beside(tile(left, top, 2), tile(middle, top, 2))
    lower = beside(tile(left, centre, 2), tile(middle, centre, 2))
    assert tile(left, top, 1) == upper + lower


def test_the_picture_of_all_jobs_is_the_whole_in_one_tile() -> None:
    picture = run.Picture(4)
    for number in range(1, run.COLUMNS * run.ROWS + 1):
        picture.paste(number, render(Tile.model_validate(run.tile_input(number, 4, 80))))
    whole = Tile(x=-2.3, y=1.2, width=3.2, height=2.4, pixels=32, iterations=80)
    assert (picture.columns, picture.rows) == (whole.pixels, whole.rows)
    assert picture.png() == run.png(32, 24, render(whole))


def test_it_is_the_mandelbrot_set() -> None:
    inside = [(0.0, 0.0), (-1.0, 0.0), (-2.0, 0.0), (0.25, 0.0), (0.0, 1.0), (-0.125, 0.75)]
    outside = [(0.3, 0.0), (-2.01, 0.0), (0.0, 1.01), (1.0, 1.0), (-0.75, 0.2)]
    assert {colour(x, y, 1000) for x, y in inside} == {INSIDE}
    assert all(colour(x, y, 1000) in PALETTE for x, y in outside)
    assert INSIDE not in PALETTE
    upper_and_lower = lines(post(x=-2, y=1, width=3, height=2, pixels=30, iterations=60), 30)
    assert upper_and_lower == upper_and_lower[::-1], "it is the same above and below the real axis"


def test_rows_follow_from_the_columns_and_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALAD_MACHINE_ID", "a-machine")
    answer = ask("POST", "/tile", json={**GOOD, "width": 0.3, "height": 0.1, "pixels": 21}).json()
    assert (answer["columns"], answer["rows"], answer["machine"]) == (21, 7, "a-machine")


def test_health() -> None:
    assert ask("GET", "/health").status_code == 200


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": None}, "x: Input should be a valid number"),
        ({"x": "0"}, "x: Input should be a valid number"),
        ({"y": 9}, "y: Input should be less than or equal to 8"),
        ({"x": math.nan}, "x: Input should be a finite number"),
        ({"width": 0}, "width: Input should be greater than or equal to 0.00000"),
        ({"height": -1.0}, "height: Input should be greater than or equal to 0.00000"),
        ({"width": math.inf}, "width: Input should be a finite number"),
        ({"pixels": 0}, "pixels: Input should be greater than or equal to 1"),
        ({"pixels": 1.5}, "pixels: Input should be a valid integer"),
        ({"pixels": 1 << 80}, "pixels: Input should be less than or equal to 2048"),
        ({"iterations": True}, "iterations: Input should be a valid integer"),
        ({"iterations": 100_001}, "iterations: Input should be less than or equal to 100000"),
        ({"zoom": 2}, "zoom: Extra inputs are not permitted"),
        ({"pixels": 15}, "tile: pixels are squares: 15 in a row would be 11.25 in a column"),
        ({"width": 1, "height": 4, "pixels": 1024}, "tile: 4096 pixels in a column are more than 2048"),
        ({"width": 5e-324}, "width: Input should be greater than or equal to 0.00000"),
    ],
)
def test_what_it_cannot_render_it_refuses_with_the_reason(change: dict[str, object], said: str) -> None:
    body = json.dumps({**GOOD, **change})  # with NaN and Infinity, as some programs write them
    answer = ask("POST", "/tile", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    (line,) = answer.json()["detail"]
    assert line.startswith(said)


@pytest.mark.parametrize("body", ["", "{", "[]", "7", '"tile"'])
def test_what_is_no_tile_at_all_is_refused(body: str) -> None:
    answer = ask("POST", "/tile", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert len(answer.json()["detail"]) == 1


def test_everything_that_is_missing_is_named() -> None:
    answer = ask("POST", "/tile", json={})
    assert answer.status_code == 422
    assert answer.json()["detail"] == [f"{name}: Field required" for name in GOOD]


def test_the_file_is_a_png() -> None:
    rgb = bytes(range(3 * 5 * 2))
    data = run.png(5, 2, rgb)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + content),)
        chunks[kind] = content
        at += length + 12
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert chunks[b"IHDR"] == struct.pack(">IIBBBBB", 5, 2, 8, 2, 0, 0, 0)
    assert zlib.decompress(chunks[b"IDAT"]) == b"\0" + rgb[:15] + b"\0" + rgb[15:]


def test_the_app_has_no_line_of_ours() -> None:
    source = (Path(run.HERE) / "app.py").read_text(encoding="utf-8")
    assert "heeler" not in source.lower()
