"""The log, as lines of ``key=value`` or of JSON.

Calls log a word and fields, as in ``log.info("refused method=%s code=%s", ...)``; both forms are made from the call's
own template and arguments, so that no value can look like a field.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Literal, get_args

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

TEXT = "time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
#: A field whose value the call states itself.
_CONSTANT = re.compile(r"(\w+)=(?:'([^']*)'|([a-z_]+))")
#: A field whose value is an argument.
_FIELD = re.compile(r"(\w+)=%[-+ #0-9.]*[a-z]")


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, event, its fields, and an error's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Event and fields of a record; a message that has no fields is its event's text alone."""
    template = str(record.msg)
    names = _FIELD.findall(template)
    arguments = record.args if isinstance(record.args, tuple) else ()
    if not names or len(names) != len(arguments):
        return {"event": "message", "message": record.getMessage()}
    event = template.partition(" ")[0]
    constants = {name: quoted or word for name, quoted, word in _CONSTANT.findall(template)}
    return {"event": event, **constants, **dict(zip(names, arguments, strict=True))}


def set_up(handler: logging.Handler, chosen: LogFormat) -> None:
    """Let a handler write the chosen form."""
    handler.setFormatter(JsonFormatter() if chosen == "json" else logging.Formatter(TEXT))
