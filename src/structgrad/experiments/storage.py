"""The database of a queue: open it, one process at a time, and keep its password secret."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.pool import NullPool

from structgrad.common.installing import install
from structgrad.common.text import first_line

#: The environment variable that gives workers the password of a storage. No file and no command
#: line contains it.
PASSWORD = "STRUCTGRAD_STORAGE_PASSWORD"
_HIDDEN = "***"
_OTHER = "start the server, or name another one: storage=postgresql://me@host/sweeps"
_EXAMPLE = "e.g. storage=postgresql://me@host/sweeps"


class SweepError(RuntimeError):
    """A sweep cannot go on; the message is one line."""


def keep_password(url: str, environment: MutableMapping[str, str]) -> str:
    """The URL of a storage without its password, which only the environment of this process and its
    children keeps.

    Raises:
        SweepError: if this is no URL. The message does not show it, because part of it may be a
            password.
    """
    if not url or url.startswith("sqlite:///"):
        return url
    if url.partition("://")[2].partition("?")[0].count("@") > 1:
        raise SweepError("storage=...: there are two @ in it; type %40 for an @ in the password, or use ~/.pgpass")
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise SweepError(f"storage=...: this is no URL of a database; {_EXAMPLE}") from None
    query = {key: value for key, value in parsed.query.items() if key not in ("password", "passwd")}
    password = parsed.password or next((v for k, v in parsed.query.items() if k not in query), None)
    if password is None:
        return url
    environment[PASSWORD] = str(password)
    return URL.create(
        parsed.drivername, parsed.username, None, parsed.host, parsed.port, parsed.database, query
    ).render_as_string(hide_password=False)


def without_password(text: str) -> str:
    """A part of a command line in printable form."""
    return re.sub(r"://[^/]*@", f"://{_HIDDEN}@", text)


def masked(text: str) -> str:
    """The text without the password, if it contains that."""
    secret = os.environ.get(PASSWORD)
    return text.replace(secret, _HIDDEN) if secret else text


class Storage:
    """The studies of a queue, and the summaries of its finished trials, in one database.

    Args:
        url: without a password, which is in the environment or in a file of the database's own
            (``~/.pgpass``).
        heartbeat: see :class:`~structgrad.experiments.queue.Plan`.
        grace: see there.

    Attributes:
        studies: Optuna's storage, which remembers finished trials.
        record_heartbeat: records a sign of life of an entry, by its id.

    Raises:
        SweepError: one line, if it cannot be opened.
    """

    def __init__(self, url: str, heartbeat: int, grace: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        # Optuna's heartbeat thread is part of `optimize`, which makes its own trials; ours is
        # `Queue.alive`.
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        try:
            where = make_url(url.replace("postgresql://", "postgresql+psycopg://", 1))
            self._file = where.database if where.drivername == "sqlite" else None
            self._postgresql = where.drivername == "postgresql+psycopg"
            if self._file is not None:
                Path(self._file).parent.mkdir(parents=True, exist_ok=True)
            elif os.environ.get(PASSWORD):
                where = where.set(password=os.environ[PASSWORD])
            options: dict[str, Any] = {"pool_pre_ping": True}
            if self._file is not None:
                options = {"connect_args": {"timeout": 60}}
            self._engine = sqlalchemy.create_engine(where, poolclass=NullPool)
            with self.alone("opening"):
                made = RDBStorage(
                    where.render_as_string(hide_password=False),
                    options,
                    heartbeat_interval=heartbeat,
                    grace_period=grace,
                )
                self.studies: BaseStorage = optuna.storages.get_storage(made)
                self.record_heartbeat = made.record_heartbeat
                self._records = _Records(made.engine)
            self._engine = made.engine
        except ModuleNotFoundError as error:
            raise SweepError(f"storage={url}: no package {error.name}; {install('postgresql')}") from error
        except ImportError as error:
            raise SweepError(f"storage={url}: {masked(first_line(error.__cause__ or error))}; {_OTHER}") from None
        except OSError as error:
            raise SweepError(f"storage={url}: {error.strerror}; folder=<folder> names another place") from error
        except Exception as error:  # every database has its own errors
            if type(error).__module__.split(".")[0] not in ("sqlalchemy", "optuna", "psycopg", "alembic"):
                raise
            raise SweepError(f"storage={url}: {masked(first_line(error.__cause__ or error))}; {_OTHER}") from None

    @property
    def is_exclusive(self) -> bool:
        """Whether :meth:`alone` excludes others. It does for SQLite and PostgreSQL only."""
        return self._file is not None or self._postgresql

    def alone(self, what: str) -> AbstractContextManager[Any]:
        """Keep other processes out of a part of the database, until the end of the block or of this
        process.

        SQLite would let two processes take one trial. Two processes that start at once on an empty
        PostgreSQL database would both create its tables.
        """
        if self._file is not None:
            return FileLock(f"{self._file}.lock")
        return _advisory_lock(self._engine, what) if self._postgresql else nullcontext()

    def keep(self, study: str, index: int, content: dict[str, Any]) -> None:
        """Keep the summary of a finished trial, so that every machine can write its file."""
        self._records.keep(study, index, json.dumps(content))

    def kept(self, study: str, index: int) -> dict[str, Any] | None:
        """The summary that :meth:`keep` stored."""
        content = self._records.kept(study, index)
        return None if content is None else json.loads(content)


class _Records:
    """A table of our own beside Optuna's, so that workers do not read the summaries of all others."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        metadata = sqlalchemy.MetaData()
        self.table = sqlalchemy.Table(
            "structgrad_summaries",
            metadata,
            sqlalchemy.Column("study", sqlalchemy.String(512), primary_key=True),
            sqlalchemy.Column("trial", sqlalchemy.Integer, primary_key=True, autoincrement=False),
            sqlalchemy.Column("content", sqlalchemy.Text().with_variant(sqlalchemy.Text(2**24), "mysql")),
        )
        metadata.create_all(engine)

    def _of(self, study: str, index: int) -> Any:
        return (self.table.c.study == study) & (self.table.c.trial == index)

    def keep(self, study: str, index: int, content: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(self.table.delete().where(self._of(study, index)))
            connection.execute(self.table.insert().values(study=study, trial=index, content=content))

    def kept(self, study: str, index: int) -> str | None:
        with self.engine.connect() as connection:
            chosen = sqlalchemy.select(self.table.c.content).where(self._of(study, index))
            content: str | None = connection.execute(chosen).scalar()
        return content


@contextmanager
def _advisory_lock(engine: Engine, what: str) -> Iterator[None]:
    """A lock of a PostgreSQL server, which frees it when the connection ends for any reason."""
    key = int.from_bytes(hashlib.sha256(f"structgrad sweeps, {what}".encode()).digest()[:7])
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": key})
        try:
            yield
        finally:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_unlock(:key)"), {"key": key})
