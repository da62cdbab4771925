"""What decoders of bytes from outside raise. Each of them turns all of it into one typed error of its own."""

from __future__ import annotations

import msgspec

#: Beside its own errors msgspec lets through invalid UTF-8 (a ValueError), documents nested too deeply, and numbers or
#: lengths beyond what the interpreter holds.
MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError)
