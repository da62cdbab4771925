"""Names that the exporter writes and an engine reads: engines, and inputs and outputs of programs.

They stand in a module of their own because the exporter must not load an engine for them.
"""

from __future__ import annotations

from typing import Literal

#: Engines that run programs on a device; the first comes with the bare install.
EngineName = Literal["onnxruntime", "executorch"]
ENGINES: tuple[EngineName, ...] = ("onnxruntime", "executorch")

#: Suffix of an ONNX output whose name is that of an input, since ONNX has one namespace for both.
OUTPUT_SUFFIX = "_out"

#: Constant methods of a ``.pte``, beside ``forward``, that give the names of its values, which it takes by position.
INPUTS_METHOD, OUTPUTS_METHOD = "input_names", "output_names"
NAME_SEPARATOR = ","
