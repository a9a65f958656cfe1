"""What a bucket keeps of the jobs of a queue that keeps nothing itself: status, attempts, timings and results.

`RecordedSource` wraps a source, so that each of its leases is one of a job with a record (docs/records.md).
"""
