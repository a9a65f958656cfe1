"""An HTTP app that renders tiles of the Mandelbrot set: `uvicorn app:app --port 8080`.

`POST /tile` says which part of the plane and how finely, and gives the colours of its pixels. `GET /health` answers
while the app can take a tile. It knows nothing of queues: it is an app as you may have one already.
"""

from __future__ import annotations

import base64
import os
import zlib
from bisect import bisect
from fractions import Fraction
from itertools import chain

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

FARTHEST = 8.0  # from 0, of what may be asked for
SMALLEST = 1e-12  # of a side; not far below, the processor's numbers can't tell pixels apart
MOST_PIXELS = 2048  # of a side
MOST_ITERATIONS = 100_000
COLOURS = ((0, 7, 100), (32, 107, 203), (237, 255, 255), (255, 170, 0), (60, 10, 30), (0, 7, 100))
STEPS = (0, 40, 108, 164, 220, 256)  # where these colours stand among 256; between them it fades
INSIDE = bytes(3)  # black

app = FastAPI(title="Mandelbrot tiles")


class Tile(BaseModel):
    """A part of the plane. Pixels are squares, so the number of rows follows from that of the columns."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    x: float = Field(ge=-FARTHEST, le=FARTHEST, description="its left edge")
    y: float = Field(ge=-FARTHEST, le=FARTHEST, description="its upper edge")
    width: float = Field(ge=SMALLEST, le=2 * FARTHEST)
    height: float = Field(ge=SMALLEST, le=2 * FARTHEST)
    pixels: int = Field(ge=1, le=MOST_PIXELS, description="in a row")
    iterations: int = Field(ge=1, le=MOST_ITERATIONS, description="after which a point counts as one of the set")

    @model_validator(mode="after")
    def _check_rows(self) -> Tile:
        rows = exact(self.height) * self.pixels / exact(self.width)
        if rows.denominator != 1:
            raise ValueError(f"pixels are squares: {self.pixels} in a row would be {float(rows):g} in a column")
        if rows > MOST_PIXELS:
            raise ValueError(f"{rows} pixels in a column are more than {MOST_PIXELS}")
        return self

    @property
    def rows(self) -> int:
        """How many rows of pixels it has."""
        return int(exact(self.height) * self.pixels / exact(self.width))


class Picture(BaseModel):
    """A rendered tile."""

    columns: int
    rows: int
    rgb: str = Field(description="three bytes a pixel, row by row from the top, compressed by zlib, in base64")
    machine: str = Field(description="where it was rendered, on SaladCloud")


@app.post("/tile")
def post_tile(tile: Tile) -> Picture:
    """Render a tile."""
    packed = base64.b64encode(zlib.compress(render(tile)))
    machine = os.environ.get("SALAD_MACHINE_ID", "")
    return Picture(columns=tile.pixels, rows=tile.rows, rgb=packed.decode(), machine=machine)


@app.get("/health")
async def get_health() -> dict[str, str]:
    """Say that we are there."""
    return {"status": "ok"}


@app.exception_handler(RequestValidationError)
async def refuse(_request: Request, error: RequestValidationError) -> JSONResponse:
    """Say in a line each what is wrong. The values are left out: JSON can't carry all of them back."""
    lines = []
    for entry in error.errors():
        where = ".".join(map(str, entry["loc"][1:])) or "tile"
        lines.append(f"{where}: {entry['msg'].removeprefix('Value error, ')}")
    return JSONResponse({"detail": lines}, 422)


def exact(number: float) -> Fraction:
    """The number as people wrote it: 0.1 is a tenth here, which it is not for the processor."""
    return Fraction(repr(number))


def render(tile: Tile) -> bytes:
    """The colours of a tile's pixels.

    A pixel's centre is computed exactly and rounded once. So it is the same number whatever tile it is asked for in,
    and tiles that share an edge fit together without a seam.
    """
    side = exact(tile.width) / tile.pixels
    xs = [float(exact(tile.x) + side * (2 * column + 1) / 2) for column in range(tile.pixels)]
    ys = [float(exact(tile.y) - side * (2 * row + 1) / 2) for row in range(tile.rows)]
    return b"".join(chain.from_iterable((colour(x, y, tile.iterations) for x in xs) for y in ys))


def colour(x: float, y: float, iterations: int) -> bytes:
    """The colour of a point: by how soon it is certain that it is not of the set."""
    re = im = re_squared = im_squared = 0.0
    for count in range(iterations):
        im = 2.0 * re * im + y
        re = re_squared - im_squared + x
        re_squared = re * re
        im_squared = im * im
        if re_squared + im_squared > 4.0:
            return PALETTE[count * 6 % 256]
    return INSIDE


def fade(step: int) -> bytes:
    """The colour at a step of the palette, in whole numbers: the same on every machine."""
    after = bisect(STEPS, step)
    start, end = STEPS[after - 1], STEPS[after]
    pairs = zip(COLOURS[after - 1], COLOURS[after], strict=True)
    return bytes((old * (end - step) + new * (step - start)) // (end - start) for old, new in pairs)


PALETTE = [fade(step) for step in range(256)]
