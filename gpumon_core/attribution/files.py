"""Small files of /proc, as bytes."""

from __future__ import annotations

import os

# A process may have given itself arguments without end.
LARGEST = 1 << 22


def read(path: str, largest: int = LARGEST) -> bytes | None:
    """A file's bytes, or as many as are of use; None where it is gone or may not be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        # /proc/stat of a large machine takes several reads: it counts every interrupt of every line.
        parts, size = [], 0
        while size < largest and (part := os.read(descriptor, 65536)):
            parts.append(part)
            size += len(part)
        return b"".join(parts)
    except OSError:
        # The process ended between open and read (ESRCH).
        return None
    finally:
        os.close(descriptor)
