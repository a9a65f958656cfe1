from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AcceptJobsRequest(_message.Message):
    __slots__ = ("current_job_id",)
    CURRENT_JOB_ID_FIELD_NUMBER: _ClassVar[int]
    current_job_id: str
    def __init__(self, current_job_id: _Optional[str] = ...) -> None: ...

class AcceptJobsResponse(_message.Message):
    __slots__ = ("heartbeat", "job")
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    heartbeat: _empty_pb2.Empty
    job: Job
    def __init__(self, heartbeat: _Optional[_Union[_empty_pb2.Empty, _Mapping]] = ..., job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("job_id", "port", "path", "input")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    port: int
    path: str
    input: bytes
    def __init__(self, job_id: _Optional[str] = ..., port: _Optional[int] = ..., path: _Optional[str] = ..., input: _Optional[bytes] = ...) -> None: ...

class CompleteJobRequest(_message.Message):
    __slots__ = ("job_id", "output")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    output: bytes
    def __init__(self, job_id: _Optional[str] = ..., output: _Optional[bytes] = ...) -> None: ...

class RejectJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...
