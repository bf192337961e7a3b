"""Errors for missing or wrong data; each message is one line."""


class DataError(RuntimeError):
    """The requested data are not available; the message says why in one line."""


class MissingDataError(DataError):
    """A data set is missing and cannot be downloaded; the message says which files to put where."""


class DamagedDataError(DataError):
    """A file of a data set is not in its format; the message names file, line and reason."""
