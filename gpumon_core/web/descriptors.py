"""How many files and sockets this process may have open, and how many of them are not for connections."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

# The descriptors that stay free for the recorder, the database and the log: a quarter, within these limits.
LEAST_RESERVE, MOST_RESERVE = 24, 2048


def raise_limit() -> int:
    """Raise this process's soft limit of open files to the hard one, which needs no privilege. The result is the
    limit that holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError) as error:
            log.warning(
                "the limit of open files cannot be raised from %s to %s: %s. Fewer connections are possible",
                soft,
                hard,
                error,
            )
    return limit()


def limit() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def reserve(of: int) -> int:
    """How many of these descriptors are not for connections."""
    return max(LEAST_RESERVE, min(MOST_RESERVE, of // 4))
