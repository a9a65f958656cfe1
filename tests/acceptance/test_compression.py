"""A job with `compression: true`, as Kelpie's users have them: its worker is killed, and another goes on."""

from __future__ import annotations

import gzip
import signal

from tests.acceptance.world import BUCKET, MIB, World, alive, eventually

# Counts its steps in a file, carries a large one along, and rests in the third step until it is told.
STEPS = """
cd $CHECKPOINT_DIR
step=$(cat step 2>/dev/null || echo 0)
echo "began at $step with $(cat $INPUT_DIR/data)" >> $W/starts
test -e large || head -c {large} /dev/zero > large
rm -f scratch
while [ $step -lt 5 ]; do
    step=$((step + 1)); echo $step > step.new; mv step.new step
    if [ $step = 3 ] && ! test -e $W/go; then touch scratch large.done; while ! test -e $W/go; do sleep 0.01; done; fi
done
echo done at $step > $OUTPUT_DIR/result
"""


def test_a_compressed_job_that_is_killed_midway_goes_on_elsewhere_and_leaves_what_kelpie_would(world: World) -> None:
    large = 20 * MIB
    world.storage.put(BUCKET, world.key("in/data.gz"), gzip.compress(b"input"))  # a Kelpie worker's
    world.storage.put(BUCKET, world.key("ck/step.gz"), gzip.compress(b"1\n"))
    sync = {**world.checkpoints(), **world.outputs()}
    sync["before"] = [*sync["before"], world.entry("in")]
    world.submit(world.bash(STEPS.format(large=large)), sync=sync, compression=True, heartbeat_interval=0.3)

    def unpacked() -> dict[str, bytes]:
        return {key: gzip.decompress(data) for key, data in world.storage.objects(BUCKET).items()}

    def stored() -> bool:
        found = unpacked()
        wanted = {f"ck/{name}.gz" for name in ("step", "large", "large.done", "scratch")}
        return {world.key(name) for name in wanted} <= found.keys() and found[world.key("ck/step.gz")] == b"3\n"

    with world.worker(name="a", machine="one") as first:
        eventually(stored, "the third step is stored", timeout=40)
        assert len(world.storage.objects(BUCKET)[world.key("ck/large.gz")]) < large // 100
        program = world.told_pid()
        first.signal(signal.SIGKILL)
        eventually(lambda: not alive(program), "the program died with its worker")
    world.tell("go")
    with world.worker(name="b", machine="two"):
        world.wait_state("done", timeout=40)
    assert (world.folder / "starts").read_text() == "began at 1 with input\nbegan at 3 with input\n"
    assert unpacked() == {
        world.key("in/data.gz"): b"input",
        world.key("ck/step.gz"): b"5\n",
        world.key("ck/large.gz"): bytes(large),
        world.key("ck/large.done.gz"): b"",
        world.key("out/result.gz"): b"done at 5\n",
    }
