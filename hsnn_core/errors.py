"""Every error that a person can cause or has to act on.

A message says what was got, what was expected and what to do; the class says which side has to act.
"""

from __future__ import annotations


class HsnnError(Exception):
    """Base of all errors that are reported without a traceback.

    ``status``: name of the gRPC status that a server's refusal came with, None for all that no server said."""

    status: str | None = None


class SchemaError(HsnnError):
    """A schema or recipe is not valid; the message starts with the dotted path of the entry."""


class SchemaMismatch(HsnnError):
    """Two sides hold different schemas; the message has both hashes and the first difference."""


class DataError(HsnnError):
    """A table or an array of training data is not what it should be."""


class FeatureError(HsnnError):
    """A value of a feature cannot be encoded: name, type, shape, range or NaN."""


class FormatError(HsnnError):
    """A file is not readable as its format: magic, version, kind, length or sha256."""


class LogError(HsnnError):
    """The item log cannot be written or read now: no room, another server's, or what is asked for is forgotten."""


class SearchError(HsnnError):
    """A search was asked for something impossible, or a scorer gave unusable scores."""


class PublishError(HsnnError):
    """A snapshot was refused or could not be put into the model repository."""


class ServerError(HsnnError):
    """The server could not start, or failed to answer."""


class Overloaded(ServerError):
    """The server refused at once: it has too much to do. Asking it again makes that worse; ask another one."""


class RequestError(HsnnError):
    """A request is malformed; sending it again cannot help."""


class DeadlineExceeded(HsnnError):
    """The time that the caller allowed has passed."""
