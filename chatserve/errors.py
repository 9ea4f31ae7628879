"""The exception hierarchy. Knows nothing of HTTP statuses and imports nothing.

    ChatserveError
    ├─ InvalidRequest
    │  ├─ ContextLengthExceeded
    │  ├─ UnsupportedParameter
    │  ├─ PreviousResponseNotFound
    │  ├─ CannotLoad
    │  ├─ ModelConflict
    │  └─ AdapterRefused
    │     └─ AdapterConflict
    ├─ InvalidAPIKey
    ├─ ModelNotFound
    ├─ ResponseNotFound
    ├─ ConversationNotFound
    ├─ ConversationChanged
    ├─ RouteNotFound
    ├─ MethodNotAllowed
    ├─ BodyTooLarge
    ├─ BodyTooSlow
    ├─ HeadersTooLarge
    ├─ HeadersTooSlow
    ├─ UnsupportedMediaType
    ├─ Overloaded
    ├─ OutOfMemory
    ├─ GenerationFailed
    │  └─ EngineStopped
    ├─ DeadlineExceeded
    │  ├─ QueueTimeout
    │  ├─ FirstTokenTimeout
    │  ├─ TokenGapTimeout
    │  └─ RequestTimeout
    ├─ StorageFailed
    │  ├─ StorageFull
    │  └─ StorageUnavailable
    ├─ NoWorkerAvailable
    │  ├─ ModelNotLoaded
    │  └─ NoRoomForModel
    ├─ WorkerLost
    │  └─ WorkerStalled
    ├─ CannotResume
    ├─ RegistrationRefused
    ├─ HostNotAllowed
    ├─ OriginNotAllowed
    ├─ OperatorOnly
    ├─ ShuttingDown
    ├─ BadStream
    └─ StartupError                a process ends with `exit_code` and one line on stderr
       ├─ UsageError               2
       ├─ ModelLoadError           3
       ├─ DoesNotFit               4
       ├─ CannotBind               5
       ├─ RegistrationFailed       6
       ├─ CrashLoop                7
       ├─ HubError                 1
       ├─ CannotWrite              1
       └─ TrainingDiverged         8

Every message is one sentence a user can act on: it names the value, the limit and the way out.
"""

from __future__ import annotations

from typing import ClassVar


class ChatserveError(Exception):
    """Root of all errors that chatserve raises on purpose.

    `code` is the machine-readable name that goes over the wire, `param` the request field at fault.
    `is_foreign`: the words are another server's.
    """

    code: ClassVar[str] = "internal_error"
    is_foreign = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(ChatserveError):
    """The request is malformed or asks for something impossible."""

    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or prompt plus `max_tokens`, is longer than the model's context."""

    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    """A field or value that chatserve does not implement; nothing is dropped in silence."""

    code = "unsupported_parameter"


class PreviousResponseNotFound(InvalidRequest):
    """The response that a request goes on from is not kept, or belongs to another key."""

    code = "previous_response_not_found"


class CannotLoad(InvalidRequest):
    """A model that cannot be loaded: the worker's own last line, and what it ended with."""

    code = "cannot_load_model"

    def __init__(self, message: str, *, param: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message, param=param)
        self.exit_code = exit_code


class ModelConflict(InvalidRequest):
    """A model whose name is another one's already, or that somebody unloads meanwhile."""

    code = "model_conflict"


class AdapterRefused(InvalidRequest):
    """An adapter that cannot be loaded beside the base; whatever was there goes on serving."""

    code = "adapter_refused"


class AdapterConflict(AdapterRefused):
    """An adapter whose name is taken, or that another request has changed in the meantime."""

    code = "adapter_conflict"


class InvalidAPIKey(ChatserveError):
    """No key, or not one of the configured keys."""

    code = "invalid_api_key"


class ModelNotFound(ChatserveError):
    """No worker serves the model of this name."""

    code = "model_not_found"


class ResponseNotFound(ChatserveError):
    """No response of this id is kept for this key."""

    code = "response_not_found"


class ConversationNotFound(ChatserveError):
    """No conversation of this id is kept for this key."""

    code = "conversation_not_found"


class ConversationChanged(ChatserveError):
    """A conversation was changed by somebody else since it was read."""

    code = "conversation_changed"


class RouteNotFound(ChatserveError):
    """No route has this path."""

    code = "not_found"


class MethodNotAllowed(ChatserveError):
    """The path exists, the method does not."""

    code = "method_not_allowed"


class BodyTooLarge(ChatserveError):
    """The request body is over the byte limit."""

    code = "body_too_large"


class BodyTooSlow(ChatserveError):
    """The request body did not come in time."""

    code = "body_too_slow"


class HeadersTooLarge(ChatserveError):
    """The request's headers are too many or too long."""

    code = "headers_too_large"


class HeadersTooSlow(ChatserveError):
    """The request's headers did not come in time."""

    code = "headers_too_slow"


class UnsupportedMediaType(ChatserveError):
    """The request body is not JSON."""

    code = "unsupported_media_type"


class Overloaded(ChatserveError):
    """The queue is full; `retry_after_s` says when to come back."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OutOfMemory(ChatserveError):
    """This one sequence did not fit in memory; its neighbours go on."""

    code = "out_of_memory"


class GenerationFailed(ChatserveError):
    """The engine failed while it was generating this sequence."""

    code = "generation_failed"


class EngineStopped(GenerationFailed):
    """The worker's engine is gone or about to go; another worker could generate this sequence."""

    code = "engine_stopped"


class DeadlineExceeded(ChatserveError):
    """A request has waited or taken longer than a limit allows; its sequences are aborted."""

    code = "deadline_exceeded"


class QueueTimeout(DeadlineExceeded):
    """Its turn did not come in time."""

    code = "queue_timeout"


class FirstTokenTimeout(DeadlineExceeded):
    """No token came in time after its arrival."""

    code = "first_token_timeout"


class TokenGapTimeout(DeadlineExceeded):
    """No further token came in time after the last one."""

    code = "token_gap_timeout"


class RequestTimeout(DeadlineExceeded):
    """The whole answer took too long."""

    code = "request_timeout"


class StorageFailed(ChatserveError):
    """What is kept on disk for later requests cannot be read or written."""

    code = "storage_failed"


class StorageFull(StorageFailed):
    """There is no room: the disk is full, or a limit on what is kept is reached."""

    code = "storage_full"


class StorageUnavailable(StorageFailed):
    """The file cannot be used now: a disk is read-only, or a right is missing."""

    code = "storage_unavailable"


class NoWorkerAvailable(ChatserveError):
    """The model is known, but no worker is ready to serve it now."""

    code = "no_worker_available"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelNotLoaded(NoWorkerAvailable):
    """The model is known, and has to be loaded first."""

    code = "model_not_loaded"


class NoRoomForModel(NoWorkerAvailable):
    """The model is known, and those that are busy leave no room for it now."""

    code = "no_room_for_model"


class WorkerLost(ChatserveError):
    """The worker died or went away in the middle of an answer."""

    code = "worker_died"


class CannotResume(ChatserveError):
    """This worker would go on with an answer in other words than the one that began it."""

    code = "cannot_resume"


class WorkerStalled(WorkerLost):
    """The worker is there and has work, but makes no step."""

    code = "worker_stalled"


class RegistrationRefused(ChatserveError):
    """The controller does not accept this worker (token, address or call-back)."""

    code = "registration_refused"


class HostNotAllowed(ChatserveError):
    """The Host header names another machine: a page may be rebinding DNS to reach this server."""

    code = "host_not_allowed"


class OriginNotAllowed(ChatserveError):
    """A page of another site asks for what only the server's own page may have."""

    code = "origin_not_allowed"


class OperatorOnly(ChatserveError):
    """Only who holds the control token may do this; an API key is not enough."""

    code = "operator_only"


class ShuttingDown(ChatserveError):
    """The server is about to stop: answers under way are finished, new ones are refused."""

    code = "server_shutting_down"

    def __init__(self, message: str, *, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BadStream(ChatserveError):
    """The other side sent something that is not a stream of OpenAI events."""

    code = "bad_stream"


class StartupError(ChatserveError):
    """A process cannot go on: it prints one line and exits with `exit_code`; never reaches HTTP."""

    code = "startup_error"
    exit_code: ClassVar[int] = 1


class UsageError(StartupError):
    """Wrong flags, unknown alias or template, public bind without a key."""

    exit_code = 2


class ModelLoadError(StartupError):
    """Missing or bad model files."""

    exit_code = 3


class DoesNotFit(StartupError):
    """The model needs more memory than there is."""

    exit_code = 4


class CannotBind(StartupError):
    """The address or port cannot be bound."""

    exit_code = 5


class RegistrationFailed(StartupError):
    """The controller refused this worker."""

    exit_code = 6


class CrashLoop(StartupError):
    """The worker keeps crashing and the supervisor gave up."""

    exit_code = 7


class HubError(StartupError):
    """A download failed: hub unreachable, wrong checksum, disk full."""

    exit_code = 1


class CannotWrite(StartupError):
    """Weights cannot be written: disk full, read-only, no right to."""

    exit_code = 1


class TrainingDiverged(StartupError):
    """A loss, gradient or reward became no number; the last good checkpoint is kept."""

    exit_code = 8
