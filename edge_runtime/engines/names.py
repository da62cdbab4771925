"""Names that the exporter writes and an engine reads: engines, and inputs and outputs of programs.

They stand in a module of their own because the exporter must not load an engine for them.
"""

from __future__ import annotations

from typing import Literal

#: What runs programs on a device; the first is what the bare install carries.
EngineName = Literal["onnxruntime", "executorch"]
ENGINES: tuple[EngineName, ...] = ("onnxruntime", "executorch")

#: ONNX has one namespace for inputs and outputs; an output that continues an input's name carries this suffix.
OUTPUT_SUFFIX = "_out"

#: A ``.pte`` takes values by position. Two constant methods beside ``forward`` give the names, in order.
INPUTS_METHOD, OUTPUTS_METHOD = "input_names", "output_names"
NAME_SEPARATOR = ","
