"""How program files name their outputs; shared by the exporter, which must not load the engine for it."""

from __future__ import annotations

#: ONNX has one namespace for inputs and outputs; an output that continues an input's name carries this suffix.
OUTPUT_SUFFIX = "_out"
