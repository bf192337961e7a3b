"""How data can be missing or wrong; each message is one line."""


class DataError(RuntimeError):
    """Data cannot be had as they were asked for; the message says why in one line."""


class MissingDataError(DataError):
    """A data set is not here and cannot be downloaded; the message says what to put where."""


class DamagedDataError(DataError):
    """A file of a data set is not in its format; the message names file, line and reason."""
