"""Errors of this package; each is also the builtin that a caller would expect to catch."""

from __future__ import annotations

MESSAGE_LENGTH = 300
"""Characters of an error message, at most."""


class DeitModelsError(Exception):
    """Base of all errors raised by deit-models: the message says what was given, what was expected, what to do.

    Messages hold names and texts of others: they are shown on one line of at most MESSAGE_LENGTH characters. The whole
    text is in `args`.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


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


def one_line(text: str, length: int = MESSAGE_LENGTH) -> str:
    """A text of others on one line: control characters escaped, a part before the end left out where it is longer."""
    if len(text) > length:
        end = length // 4
        text = f"{text[: length - 3 - end]}...{text[-end:]}"
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c in "\r\n" else ascii(c)[1:-1] for c in text)
        return one_line(text, length)
    return text


def first_line(error: BaseException) -> str:
    """An error's message, or its kind, on one line."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])


def shown(value: object) -> str:
    """A value of others in a message: its `repr`, shortened."""
    try:
        return one_line(repr(value), 80)
    except Exception:  # noqa: BLE001 - whole numbers beyond 4,300 digits, and objects of others, have none
        return f"a {type(value).__name__} that cannot be shown"
