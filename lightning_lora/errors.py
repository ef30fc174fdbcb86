# SPDX-License-Identifier: Apache-2.0
"""Every exception and warning of the package, each a subclass of the builtin that it refines."""

from __future__ import annotations


class Notice(UserWarning):
    """A named warning: something the user should know that is no error."""


class ConfigError(ValueError):
    """An argument has a value that cannot be used."""


class UnsupportedError(NotImplementedError):
    """What was asked for is not built, or does not go together; the message names it."""


class MissingDependencyError(ModuleNotFoundError):
    """An optional package is needed and not installed; the message says how to install it."""


class TargetError(ValueError):
    """``target_modules`` or ``modules_to_save`` chose nothing, or something that cannot be adapted."""


class QuantizationError(ValueError):
    """A weight cannot be packed as asked."""


class AlreadyAdaptedError(RuntimeError):
    """The model already carries adapters, or two owners claim it."""


class AdapterMismatchError(ValueError):
    """Keys, shapes or configuration of an adapter do not fit the model."""


class BaseMismatchError(ValueError):
    """The base model is not the one that the adapter was trained on."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used for what was asked."""


class WriteError(OSError):
    """A file or folder could not be written: no room, no permission. What stood there before still stands."""


class GradientError(RuntimeError):
    """Adapters are in the model but do not learn."""


class OptimizerError(RuntimeError):
    """The optimizer does not hold what is to be trained."""


class MergeError(RuntimeError):
    """A merged model differs from the live one by more than the stated limit, or cannot be written."""


class TaskError(ValueError):
    """An evaluation task cannot be loaded or used."""


class DataError(ValueError):
    """Training data cannot be read or used; the message says which file and line."""
