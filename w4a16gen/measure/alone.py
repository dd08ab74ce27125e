"""One run at a time in a folder: two would disturb each other's times, and replace each other's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import sole_writer


@contextmanager
def alone(folder: Path, option: str) -> Iterator[None]:
    """Make a folder, and keep other runs out of it until this one ends.

    Args:
        folder: the folder.
        option: the option that names another one, for the message.

    Raises:
        InvalidValueError: if another run is at work there.
        OSError: if it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(sole_writer(folder))
        except BlockingIOError:
            raise InvalidValueError(
                f"another process is measuring into {folder}: wait for it, or name another folder with {option}"
            ) from None
        yield
