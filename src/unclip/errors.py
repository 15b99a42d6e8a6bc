"""The exceptions of unclip. Each message states the value, the limit and the remedy.

UnclipError
├── InputError (ValueError)            an argument is wrong: its value, type, shape or width
│   └── ImageError                     a picture cannot be used: broken, too large, not an image
├── ConfigError (ValueError)           a setting is unknown, out of its limits, or not implemented
├── CheckpointError (ValueError)       a model on disk cannot be used
│   ├── MissingFileError (FileNotFoundError)   a folder, a file or a shard does not exist
│   ├── UnsafeFileError                a pickle, or a path that leaves its folder
│   └── WeightsError                   truncated, overlapping, duplicate, NaN, missing or extra weights
├── DataError (ValueError)             a data set or one of its samples cannot be used
├── TrainingError (RuntimeError)       a training run cannot continue, such as after a loss of NaN
├── NonFiniteError (ArithmeticError)   a result is NaN or infinite
├── OutputError (OSError)              a file cannot be written: a full disk, no permission
├── OutputExistsError (FileExistsError)        a file exists, and overwriting was not requested
├── MissingDependencyError (ImportError)       an optional package is required
└── Cancelled                          a callback stopped the run
"""


class UnclipError(Exception):
    """Base of every error that unclip raises on purpose."""


class InputError(UnclipError, ValueError):
    """An argument is wrong: its value, its type, its shape or its width."""


class ImageError(InputError):
    """A picture cannot be used: it is broken, too large, or not a picture."""


class ConfigError(UnclipError, ValueError):
    """A setting is unknown, outside its limits, or not implemented."""


class CheckpointError(UnclipError, ValueError):
    """A model on disk cannot be used."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A folder, a file or a shard that a model needs does not exist."""


class UnsafeFileError(CheckpointError):
    """A pickle, or a path that leaves its folder."""


class WeightsError(CheckpointError):
    """Weights are truncated, overlapping, duplicate, not finite, missing, extra or of a wrong shape."""


class DataError(UnclipError, ValueError):
    """A data set, or one of its samples, cannot be used."""


class TrainingError(UnclipError, RuntimeError):
    """A training run cannot continue."""


class NonFiniteError(UnclipError, ArithmeticError):
    """A result is NaN or infinite: numbers exceeded the range of their type, or an input was too large."""


class OutputError(UnclipError, OSError):
    """A file or folder cannot be written: the disk is full, or permission is missing."""


class OutputExistsError(UnclipError, FileExistsError):
    """A file or folder already exists, and overwriting was not requested."""


class MissingDependencyError(UnclipError, ImportError):
    """An optional package is required; the message names it."""


class Cancelled(UnclipError):  # noqa: N818  (it is not a failure)
    """A callback stopped the run before its last step."""


class EmbeddingScaleWarning(UserWarning):
    """Image embeddings are not on the scale of the model's own, or are of another CLIP."""


class UnknownCaptionWarning(UserWarning):
    """A caption is not close to anything that the model knows."""
