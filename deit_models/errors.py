"""Errors of this package; each is also the builtin that a caller would expect to catch."""

from __future__ import annotations


class DeitModelsError(Exception):
    """Base of all errors raised by deit-models: the message says what was given, what was expected, what to do."""


class UnknownModelError(DeitModelsError, ValueError):
    """A name that is neither a registered model, nor a local path, nor a Hub repository."""


class ConfigError(DeitModelsError, ValueError):
    """A model option that does not exist, or whose value does not fit the others or the input."""


class ManifestError(DeitModelsError, ValueError):
    """`weights/manifest.toml` is missing or breaks its own rules."""


class FetchError(DeitModelsError, OSError):
    """A file could not be obtained: no network, no permission, no such file."""


class SaveError(DeitModelsError, OSError):
    """A file could not be written on this machine: no space, no permission."""


class CheckpointError(DeitModelsError, ValueError):
    """A weights file is damaged, unsafe, or not the model it is said to be; no tensor of it was used."""


class IntegrityError(CheckpointError):
    """A file's SHA-256 is not the recorded one."""


class ImageError(DeitModelsError, ValueError):
    """An image cannot be decoded, or is refused because of its size."""


class DataError(DeitModelsError, ValueError):
    """A data set that does not exist, is not laid out as expected, or holds too many damaged images."""


class TrainingError(DeitModelsError, RuntimeError):
    """Training cannot go on: the loss is no number, the teacher does not fit, a saved state belongs to another run."""


class MissingExtraError(DeitModelsError, ImportError):
    """An optional dependency is not installed; the message names the `pip install` to run."""


class AgreementError(DeitModelsError, ValueError):
    """A faster or exported form of a model gives other logits than the model; it is not handed over."""


def first_line(error: BaseException) -> str:
    """An error's message, or its kind, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
