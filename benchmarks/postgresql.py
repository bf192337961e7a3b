"""A PostgreSQL server of its own for as long as a block runs, from Debian's packages."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NoServerError(RuntimeError):
    """No server can be started here; the message says why."""


@contextmanager
def server(*statements: str, rules: str = "", options: str = "") -> Iterator[str]:
    """A fresh server on a free port of this machine.

    Args:
        statements: SQL that is run in its database ``sweeps`` first.
        rules: lines in front of those of ``pg_hba.conf``.
        options: further ones of the server, e.g. ``-c max_connections=300``.

    Yields:
        its URL, for a user without a password.

    Raises:
        NoServerError: if no server is installed, or nobody may run it.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    if not found:
        raise NoServerError("needs a PostgreSQL server (Debian: apt install postgresql)")
    programs = found[-1]
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        if not shutil.which("runuser") or "postgres" not in {user.pw_name for user in pwd.getpwall()}:
            raise NoServerError("a PostgreSQL server cannot run as root, and there is no user postgres to run it as")
        as_user = ["runuser", "-u", "postgres", "--"]
    folder = Path(tempfile.mkdtemp(prefix="structgrad-postgresql-"))  # which other tests leave alone
    if as_user:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, place = folder / "data", ("-h", "127.0.0.1", "-p", str(port), "-U", "sweeper")

    def call(program: str, *arguments: str) -> None:
        command = [*as_user, str(programs / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=folder)

    try:
        call("initdb", "-D", str(data), "-U", "sweeper", "--auth=trust", "--no-sync")
        if rules:
            own = data / "pg_hba.conf"
            own.write_text(f"{rules}\n{own.read_text()}")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off {options}"
        call("pg_ctl", "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            call("createdb", *place, "sweeps")
            for statement in statements:
                call("psql", *place, "-c", statement, "sweeps")
            yield f"postgresql://sweeper@127.0.0.1:{port}/sweeps"
        finally:
            call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
