"""One tree of exceptions; the class decides the exit code of a stage (DESIGN section 4).

    RFDETRError                       70  a defect of ours, if raised as such
    ├── UserError                      2  the user must change something; never retried
    │   ├── ConfigError                   a field, a value, or an impossible combination
    │   ├── DatasetError                  images, annotations, class map
    │   ├── CheckpointError               weights that cannot be read or do not fit
    │   ├── StorageAccessError            credentials, missing bucket, full or read-only disk
    │   │   └── MissingObjectError            no file of that name
    │   ├── PublicationError              a published folder that is absent, torn or altered
    │   ├── TrainingError                 training cannot go on: a loss that is not finite, ...
    │   │   └── DeviceMemoryError            ... or out of memory at the given batch
    │   └── ExportError                   the exported model differs from the trained one
    └── TransientError                75  worth a retry
        ├── StorageUnavailableError       network, 5xx, throttling
        ├── VersionConflict               a conditional write came second
        └── ChampionChangedError          another run promoted meanwhile

    Terminated                       143  SIGTERM; everything written so far is resumable. Like KeyboardInterrupt no
                                          `Exception`: it may come in the middle of anything, and who takes all errors
                                          of a library for a broken file must not take it for one

Every message is one line: what happened and where; `hint` says what to do.
"""

from __future__ import annotations


class ExitError(BaseException):
    """What all of them are: an end with an exit code, a one-line message and a one-line hint."""

    exit_code: int

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # BaseException would rebuild from the message alone and lose the hint between processes.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[ExitError], message: str, hint: str) -> ExitError:
    return cls(message, hint=hint)


class RFDETRError(ExitError, Exception):
    """Base of all errors raised on purpose."""

    exit_code = 70


class UserError(RFDETRError):
    """The user must change something."""

    exit_code = 2


class ConfigError(UserError):
    """A field, a value, or a combination of fields is not legal."""


class DatasetError(UserError):
    """The dataset cannot be used as it is."""


class CheckpointError(UserError):
    """A weight file or checkpoint cannot be read, or does not fit the model."""


class StorageAccessError(UserError):
    """The store answered, and refused or does not have it."""


class MissingObjectError(StorageAccessError):
    """The store answered, and has no file of that name."""


class PublicationError(UserError):
    """A published folder has no manifest, or a file in it differs from its manifest."""


class TrainingError(UserError):
    """Training cannot go on with these settings."""


class DeviceMemoryError(TrainingError):
    """A training step does not fit into the device's memory."""


class ExportError(UserError):
    """The exported model does not reproduce the trained one."""


class TransientError(RFDETRError):
    """Outside of our control and worth a retry."""

    exit_code = 75


class StorageUnavailableError(TransientError):
    """The store did not answer, or answered with a 5xx or a throttle."""


class VersionConflict(TransientError):  # noqa: N818
    """The file is no longer the version that was read: another writer came first."""


class ChampionChangedError(TransientError):
    """The champion is no longer the one that was evaluated."""


class Terminated(ExitError, BaseException):  # noqa: N818
    """SIGTERM was received."""

    exit_code = 143
