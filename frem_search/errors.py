"""Every error that frem-search raises on purpose; each message says where, what was expected, what was got, what to do.

FremSearchError             exit status 1
├── UsageError              exit status 2: what was asked for cannot be done as it was asked
│   ├── StudyFileError      a study file is wrong
│   ├── ParameterError      a hyperparameter is outside what the network or the training takes
│   └── UnknownDatasetError nothing here has the name or path of a dataset; a DatasetError too
├── DatasetError            images or labels are missing, broken or do not fit each other
├── ContractError           a stored study was begun with other settings
├── StudyNotFoundError      the storage holds no such study
├── StorageError            the database cannot be reached or refuses
│   ├── DatabaseAwayError   the database stayed out of reach for longer than it was worth waiting for
│   └── LeaseLostError      the trial is not this worker's any more
├── ArtifactError           a checkpoint or prediction cannot be written or read
├── DeviceError             the device is missing or fails
│   └── DeviceMemoryError   the device has no memory left
├── WorkerError             worker processes or their cluster ended before their work was done
└── ChromeNotFoundError     no Chrome or Chromium to draw PNG, SVG or PDF with
"""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return a question that begins with a space, or nothing if no known name is near.

    >>> did_you_mean("unte", ["unet", "feedback_unet"])
    " Did you mean 'unet'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {prefix + near[0]!r}?" if near else ""


class FremSearchError(Exception):
    """The root of the tree: anything that a user can mend, with the remedy in the message."""

    exit_status = 1


class UsageError(FremSearchError):
    """What was asked for cannot be done as it was asked."""

    exit_status = 2


class StudyFileError(UsageError):
    """A study file is wrong."""


class ParameterError(UsageError):
    """A hyperparameter is outside what the network or the training takes.

    Args:
        name: The parameter as a study file spells it.
        expected: What is allowed.
        got: The value that was given.
    """

    def __init__(self, name: str, expected: str, got: object) -> None:
        super().__init__(f"{name}: expected {expected}, but got {got!r}.")
        self.name = name


class DatasetError(FremSearchError):
    """Images or labels are missing, broken or do not fit each other."""


class UnknownDatasetError(UsageError, DatasetError):
    """Nothing here has the name or path that was given for a dataset."""


class ContractError(FremSearchError):
    """A stored study was begun with other settings."""


class StudyNotFoundError(FremSearchError):
    """The storage holds no such study."""


class StorageError(FremSearchError):
    """The database cannot be reached or refuses."""


class DatabaseAwayError(StorageError):
    """The database stayed out of reach for longer than it was worth waiting for."""


class LeaseLostError(StorageError):
    """The trial is not this worker's any more: another one holds it, somebody finished it, or it was deleted."""


class ArtifactError(FremSearchError):
    """A checkpoint or prediction cannot be written or read."""


class DeviceError(FremSearchError):
    """The device is missing or fails."""


class DeviceMemoryError(DeviceError):
    """The device has no memory left; whoever gives up for it adds the remedy."""

    remedy = "Free the device, or set a smaller batch_size, image_size or base_channels."


class WorkerError(FremSearchError):
    """Worker processes ended before their work was done."""


class ChromeNotFoundError(FremSearchError):
    """No Chrome or Chromium to draw PNG, SVG or PDF with."""
