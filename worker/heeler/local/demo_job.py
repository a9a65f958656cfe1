"""The demo's program: three bodies under gravity, integrated step by step. Nothing of heeler is in it.

The motion is chaotic: a step left out or done twice changes every digit that follows. It keeps a checkpoint in
CHECKPOINT_DIR, goes on from it when started again, and writes its result to OUTPUT_DIR.

    python demo_job.py STEPS STEPS_PER_CHECKPOINT
"""

import json
import os
import sys
from pathlib import Path

Vector = list[float]

_DT = 1e-4
START: dict[str, list[Vector]] = {
    "position": [[1.0, 0.0, 0.1], [-0.5, 0.8, 0.0], [-0.4, -0.9, -0.1]],
    "velocity": [[0.0, 0.5, 0.0], [-0.4, -0.2, 0.1], [0.4, -0.3, -0.1]],
}


def accelerations(position: list[Vector]) -> list[Vector]:
    """Gravity between bodies of mass 1, softened."""
    result = [[0.0, 0.0, 0.0] for _ in position]
    for a in range(3):
        for b in range(a + 1, 3):
            d = [position[b][i] - position[a][i] for i in range(3)]
            force = (d[0] * d[0] + d[1] * d[1] + d[2] * d[2] + 1e-2) ** -1.5
            for i in range(3):
                result[a][i] += d[i] * force
                result[b][i] -= d[i] * force
    return result


def advance(state: dict[str, list[Vector]]) -> None:
    """One leapfrog step."""
    position, velocity = state["position"], state["velocity"]
    for body, pull in enumerate(accelerations(position)):
        for i in range(3):
            velocity[body][i] += _DT * pull[i]
            position[body][i] += _DT * velocity[body][i]


def load(path: Path) -> tuple[int, dict[str, list[Vector]]]:
    """The newest checkpoint, or the start."""
    if not path.exists():
        return 0, {name: [body[:] for body in bodies] for name, bodies in START.items()}
    saved = json.loads(path.read_text())
    return saved["step"], {
        name: [[float.fromhex(number) for number in body] for body in saved[name]] for name in ("position", "velocity")
    }


def save(path: Path, step: int, state: dict[str, list[Vector]]) -> None:
    """Write a checkpoint that is there whole or not at all."""
    text = {name: [[number.hex() for number in body] for body in rows] for name, rows in state.items()}
    temporary = path.with_name(".tmp")
    temporary.write_text(json.dumps({"step": step, **text}))
    temporary.replace(path)


def main() -> None:
    """Integrate from the checkpoint to the last step."""
    steps, every = int(sys.argv[1]), int(sys.argv[2])
    checkpoint = Path(os.environ["CHECKPOINT_DIR"]) / "state.json"
    step, state = load(checkpoint)
    print(f"start {step}", flush=True)
    while step < steps:
        advance(state)
        step += 1
        if step % every == 0:
            save(checkpoint, step, state)
            print(f"step {step}", flush=True)
    save(Path(os.environ["OUTPUT_DIR"]) / "result.json", step, state)


if __name__ == "__main__":
    main()
