"""How a PostgreSQL server is spoken to: no wait is without a limit, since one may accept and never answer.

The kernel of a server that has stopped (SIGSTOP, a frozen disk, a proxy that swallows everything) still confirms
what it is sent, so that neither keepalives nor tcp_user_timeout notice, and statement_timeout is the server's own
clock. Imported only where there is such a server: a recorder on SQLite does without psycopg.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

# A server that does not accept a connection, or does not go on with one, is given up after this.
CONNECT_TIMEOUT_S = 3
# The server breaks off a statement of a page or of the recorder after this,
STATEMENT_S = 30
# and one that has not even done that by then does not answer.
ANSWER_S = STATEMENT_S + 5.0
# Statements outside of a transaction (SQLAlchemy's look at a connection before it is used, the lock's
# questions), is answered at once.
ALONE_S = 5.0

# libpq's words. A network that is gone is noticed within half a minute, not after libpq's two hours.
LINK: dict[str, int] = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# The same for the server's end, which decides when what a machine that lost power had locked is free. A setting
# that an older server does not know is left out.
SESSION = """
    SELECT set_config(name, wanted.setting, false)
    FROM pg_settings JOIN (VALUES
        ('tcp_keepalives_idle', '30'), ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '3'),
        ('tcp_user_timeout', '60000'), ('idle_session_timeout', '0')
    ) AS wanted (name, setting) USING (name)
"""
# For one transaction that may take as long as it takes: a migration.
UNLIMITED = """
    SELECT set_config(name, '0', true) FROM pg_settings
    WHERE name IN (
        'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout'
    )
"""

# What a server that can be reached refuses for good: libpq has no code for what goes wrong while it connects, only
# the server's sentence. In another language than English it counts as one that may pass, which is tried again.
REFUSALS = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "pg_hba.conf rejects",
    "is not permitted to log in",
    "is not currently accepting connections",
    "permission denied for database",
    "does not exist",
    "certificate verify failed",
    "server does not support SSL",
    "invalid connection option",
)
# PostgreSQL documentation, "Error Codes". Passing: connection exceptions, insufficient resources, an operator's
# intervention (57P04 is a database that was dropped), lost races; anything else would fail again.
PASSING_CLASSES = ("08", "40", "53", "55", "57", "58")

RV = TypeVar("RV")


class ServerConnection(psycopg.Connection[Any]):
    """A connection that is closed, with psycopg.OperationalError, when the server does not answer in time.

    Every use of a connection waits in `wait`, which has the limit for what it is given: one statement, one list of
    parameters, BEGIN, COMMIT.
    """

    # None: what is asked may take as long as it takes, as a migration does.
    limit_s: float | None = ANSWER_S
    INTERVAL_S: ClassVar[float] = 0.1

    def wait(self, gen: PQGen[RV], interval: float = INTERVAL_S, timeout: float | None = None) -> RV:
        limit = timeout
        if limit is None and self.limit_s is not None:
            limit = min(ALONE_S, self.limit_s) if self.autocommit else self.limit_s
        began = time.monotonic()
        try:
            return super().wait(gen, interval, limit)
        except psycopg.OperationalError as error:
            # An error that the server answers with has a code, and leaves the connection idle or its transaction
            # failed; but for one among many statements that are under way together.
            silent = limit is not None and time.monotonic() - began >= limit and error.sqlstate is None
            if not silent or self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            # What comes later would be taken for the answer to the next question.
            self.close()
            raise psycopg.OperationalError(f"the server did not answer within {limit or 0:g} s") from error

    def break_off(self) -> None:
        """Let whatever another thread waits for on this connection fail now."""
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(self.fileno())) as own:
            own.shutdown(socket.SHUT_RDWR)


def may_come_back(error: BaseException) -> bool:
    """Whether what a server (or the way to it) said is something that passes: it is away, busy or starting.

    A wrong password, a database that does not exist and a missing right stay until somebody mends them.
    """
    cause = getattr(error, "orig", None) or error
    if not isinstance(cause, psycopg.OperationalError):
        # A lost connection in the middle of it is an InterfaceError now and then.
        return isinstance(cause, psycopg.InterfaceError)
    if cause.sqlstate is not None:
        return cause.sqlstate[:2] in PASSING_CLASSES and cause.sqlstate != "57P04"
    return not any(refusal in str(cause) for refusal in REFUSALS)
