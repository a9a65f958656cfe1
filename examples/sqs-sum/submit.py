"""Submits job.json as an array, with nothing but boto3: whoever can send a message can submit a job.

    SQS_QUEUE_URL=... python submit.py [PARTS]

Prints the ids, one a line. `heeler submit --array PARTS job.json` sends the same documents.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import boto3

JOB = Path(__file__).resolve().parent / "job.json"


def main(parts: int) -> None:
    """Send a message for each part."""
    queue = os.environ["SQS_QUEUE_URL"]
    sqs = boto3.client("sqs", region_name=os.environ.get("AWS_REGION"))
    job = json.loads(JOB.read_text(encoding="utf-8"))
    for index in range(parts):
        document = {**job, "id": f"{job['id']}-{index}", "index": index}
        # The id is the job's name: of its checkpoints, of its record, and against a second run of the same job.
        fifo = {"MessageGroupId": document["id"], "MessageDeduplicationId": document["id"]}
        sqs.send_message(QueueUrl=queue, MessageBody=json.dumps(document), **fifo if queue.endswith(".fifo") else {})
        print(document["id"], flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
