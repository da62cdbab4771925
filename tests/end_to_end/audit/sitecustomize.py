"""Put first on PYTHONPATH: notes every file that this process opens from Python in the file AUDIT_LOG."""

import os
import sys

_LOG = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes):
        os.write(_LOG, os.path.abspath(os.fsencode(arguments[0])) + b"\n")  # noqa: PTH100 - pathlib takes no bytes


sys.addaudithook(_note)
