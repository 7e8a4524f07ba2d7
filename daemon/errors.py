"""Every error that a user, a client or the machine can cause.

    QwendError
    ├── ConfigError                a flag, a file or a folder that cannot be used
    │   └── PortInUse
    ├── ModelError                 the model file
    │   ├── ModelFileError         missing, truncated, not GGUF, an incomplete split
    │   ├── UnsupportedModel       another architecture, an unknown quantization
    │   └── TensorError            a missing tensor or a wrong shape
    ├── RequestError               what a client sent; the message goes back to it
    │   ├── InvalidRequest         a value, a role, a schema; names the parameter
    │   ├── PromptTooLong          more tokens than the context holds
    │   ├── UnknownModel
    │   ├── UnknownRequest         asked about, and not remembered
    │   ├── UnknownSession         asked about, and not stored
    │   └── SessionFileError       an exported session that cannot be taken in
    ├── KeyRefused                 no API key, or none of ours
    ├── PlaceRefused               a name of the server, or a page of a browser, that is not let in
    ├── Overloaded                 try again later
    │   └── TooManyRequests        of one key
    ├── TimedOut                   the request took longer than it may
    ├── EngineStopped              the engine is shutting down or has failed
    ├── StoreError                 the checkpoint store
    │   ├── StoreVersionError      written by another format version
    │   ├── StoreInUse             another daemon holds it
    │   └── StoreFull              the disk or the map is full
    └── DeviceError                the GPU
        ├── NoDevice               none, or the driver is too old
        ├── DeviceLost             it failed in a way that ends all work on it
        ├── OutOfDeviceMemory
        └── KernelCompileError

Messages are one line and say what to do. HTTP statuses are api/app.py's business. Asserts are for
our own mistakes and never appear here.
"""


class QwendError(Exception):
    """Base of all errors that qwend raises on purpose."""


class ConfigError(QwendError):
    """A flag, a configuration value or a folder that cannot be used."""


class PortInUse(ConfigError):
    """The address to listen on is taken."""


class ModelError(QwendError):
    """The model file cannot be served."""


class ModelFileError(ModelError):
    """The file is missing, truncated, not GGUF, or a part of a split is absent."""


class UnsupportedModel(ModelError):
    """The file is sound, but its architecture or quantization is not supported."""


class TensorError(ModelError):
    """A tensor is missing or has another shape than the metadata promises."""


class RequestError(QwendError):
    """A request that cannot be served as sent; the client must change it."""


class InvalidRequest(RequestError):
    """A value that is out of range or malformed.

    Args:
        message: one sentence for the client.
        param: the name of the offending parameter, as the client wrote it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """The prompt does not fit the context; agents compact when they see this.

    Args:
        num_prompt_tokens: what the client sent, in tokens.
        context_length: what the model can hold, in tokens.
    """

    def __init__(self, num_prompt_tokens: int, context_length: int) -> None:
        super().__init__(
            f"This model's maximum context length is {context_length} tokens. "
            f"However, your messages resulted in {num_prompt_tokens} tokens. "
            "Please reduce the length of the messages."
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.context_length = context_length


class UnknownModel(RequestError):
    """The request names a model that this daemon does not serve."""


class UnknownRequest(RequestError):
    """Nothing is remembered of a request that somebody asks about."""


class UnknownSession(RequestError):
    """Nothing is stored of a session that somebody asks for."""


class SessionFileError(RequestError):
    """An exported session is damaged, of another version or of another model."""


class Overloaded(QwendError):
    """Too many requests wait already.

    Args:
        retry_after_s: when a retry makes sense, in seconds.
    """

    def __init__(self, message: str, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyRequests(Overloaded):
    """One key asks for more than it may."""


class KeyRefused(QwendError):
    """The request has no API key, or one that is not the server's."""


class PlaceRefused(QwendError):
    """The request was sent to a name, or by a page in a browser, that is not let in."""


class TimedOut(QwendError):
    """The request took longer than this server allows."""


class EngineStopped(QwendError):
    """The engine is shutting down, or has failed and cannot go on."""


class StoreError(QwendError):
    """The checkpoint store cannot be used."""


class StoreVersionError(StoreError):
    """The store was written in another format version."""


class StoreInUse(StoreError):
    """Another process has the store open for writing."""


class StoreFull(StoreError):
    """The disk, or the store's own map, has no room."""


class DeviceError(QwendError):
    """The GPU cannot be used or has failed."""


class NoDevice(DeviceError):
    """No supported GPU, or a driver that is too old."""


class DeviceLost(DeviceError):
    """The GPU failed so that nothing more can run on it in this process."""


class OutOfDeviceMemory(DeviceError):
    """The model, the context or a buffer does not fit the device's memory."""


class KernelCompileError(DeviceError):
    """A kernel did not compile; carries the compiler's log."""
