"""Logits of a causal language model's next token, from the cached keys and values of the tokens before.

Each token costs one pass of one token through the segments' decode programs. Blocks keep keys and values of every token
that they have seen, as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from edge_runtime.engines.engine import Array, Engine
from edge_runtime.errors import PackageError
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.flow import Flow
from edge_runtime.memory.plan import PROMPT_TOKENS, WeightsMode, decode_program
from edge_runtime.package.manifest import Generation, Manifest, Program
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import FloatArray, Values


class Decoder(Executor):
    """Decode programs and one text's cache.

    Args:
        prepared: the package, prepared for this machine.
        engine: engine that loads the programs.
        weights: whether weights stay in memory, packed or as they are mapped, or pass through it with each token.

    Raises:
        PackageError: the package has no decode programs, or none for the engine.
    """

    def __init__(self, prepared: PreparedPackage, engine: Engine, weights: WeightsMode = "resident") -> None:
        self._shape = _cache_shape(prepared.manifest)
        self._kept: list[tuple[Array, Array]] = []
        self._seen = 0
        super().__init__(prepared, engine, (), weights)
        self.forget()

    @property
    def seen(self) -> int:
        """Number of tokens in the cache."""
        return self._seen

    def forget(self) -> None:
        """Empty the cache, for another text."""
        shape = self._shape
        empty = [
            np.zeros((1, shape.heads, 0, size), np.float32) for size in (shape.key_size, shape.value_size)
        ]
        self._kept = [(empty[0], empty[1])] * (len(self._stages) - 2)
        self._seen = 0

    def next_logits(self, values: Values, token_ids: Sequence[int]) -> FloatArray:
        """(V,) logits of the token that follows some new ones, which join the cache.

        Args:
            values: values of all slices, by flat name.
            token_ids: the new tokens, at least one; ``PROMPT_TOKENS`` of them run at a time.
        """
        logits = np.empty(0, np.float32)
        for start in range(0, len(token_ids), PROMPT_TOKENS):
            logits = self._pass(values, token_ids[start : start + PROMPT_TOKENS])
        return logits

    def _pass(self, values: Values, token_ids: Sequence[int]) -> FloatArray:
        flow: Flow = {
            "input_ids": np.asarray([token_ids], np.int64),
            "past_mask": np.ones((1, self._seen), np.int64),
        }
        for index, (stage, following) in enumerate(zip_longest(self._stages, self._stages[1:])):
            in_block = 0 < index < len(self._stages) - 1
            if in_block:
                flow["past_key"], flow["past_value"] = self._kept[index - 1]
            self._run_stage(stage, [flow], values, None, following)
            if in_block:
                self._kept[index - 1] = flow.pop("key"), flow.pop("value")
        self._seen += len(token_ids)
        logits: FloatArray = flow["logits"][0]
        return logits

    def _program_of(self, index: int) -> Program:
        program = self.manifest.programs[decode_program(self.manifest, index)]
        if self._prepared.prepared.arithmetic not in program.variants:
            raise PackageError(
                f"package {self.manifest.name} generates text on onnxruntime alone; set the engine"
            )
        return program

    def _runs_by_tokens(self, index: int) -> bool:
        return False  # its last program gives the logits of one token


def _cache_shape(manifest: Manifest) -> Generation:
    if manifest.generation is None:
        decode_program(manifest, 0)  # says what to do
        raise PackageError(
            f"package {manifest.name} does not say what its decode programs keep; export it again"
        )
    return manifest.generation
