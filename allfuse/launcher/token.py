"""The secret of a job, from a file or the environment; never from a command line, which all see."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from allfuse.base.errors import UserError

VARIABLE = "ALLFUSE_TOKEN"
LEAST, MOST = 16, 4096  # bytes


def find_token(path: Path | None, *, make: bool) -> bytes | None:
    """The token in a file, else that of the environment, else None.

    Args:
        make: write a new one where the file is not there, for its owner's eyes only.

    Raises:
        UserError: there is no such file, others may read it, or it holds no token.
    """
    if path is None:
        value = os.environ.get(VARIABLE)
        return None if value is None else _check(value.encode().strip(), VARIABLE)
    try:
        if make and not path.exists():
            token = secrets.token_hex(32).encode()
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(token + b"\n")
            return token
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(
                f"--token-file {path}: others may read it (mode {stat.S_IMODE(mode):o}); next: "
                f"chmod 600 {path}"
            )
        return _check(path.read_bytes().strip(), f"--token-file {path}")
    except OSError as error:
        raise UserError(f"--token-file {path}: {error.strerror or error}") from None


def _check(token: bytes, where: str) -> bytes:
    if not LEAST <= len(token) <= MOST:
        raise UserError(
            f"{where}: received {len(token)} bytes; allowed: {LEAST} to {MOST}; next: let "
            "`allfuse train --listen ... --token-file NEW` make one"
        )
    return token
