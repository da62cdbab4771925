"""How ``.pte`` programs name their inputs and outputs; shared by the exporter, which must not load the engine for it.

A ``.pte`` takes values by position. Two constant methods beside ``forward`` give the names, in order.
"""

from __future__ import annotations

INPUTS_METHOD, OUTPUTS_METHOD = "input_names", "output_names"
NAME_SEPARATOR = ","
