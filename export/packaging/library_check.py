"""Before anything is lowered, the captured model must agree with the one that transformers itself loads.

The self-check compares programs with torch on weights that this exporter read. Here torch runs the captured model on
these weights, and beside it the library's own model, which the library read from the folder: a weight that was read
wrongly, or not at all, shows. Rows go through the library one by one and unpadded, through the captured model as one
padded batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel

from edge_runtime.data.batches import Batch
from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import TaskKind
from export.capture.segment import SegmentGraph
from export.model.accounting import UNUSED
from export.model.heads import HEAD, Classifier
from export.model.load import LoadedModel
from export.packaging.self_check import perturbed, torch_inputs
from export.packaging.torch_reference import TorchReference
from export.quantisation.stored import StoredModel

#: Largest relative difference between the two; both compute in float32.
LIBRARY_LIMIT = 1e-4
#: The library loads as many blocks of a larger model as this holds in float32, from the first on, and one at least.
LIBRARY_BYTES = 1 << 30


@dataclass(frozen=True)
class LibraryModel:
    """How transformers loads a folder, and what is put on top of it.

    Attributes:
        folder: model folder.
        task: what the model is trained for.
        trust_remote_code: whether Python code of the folder's own may run.
        head: classifier on top; None for a causal language model.
        arguments: further arguments of the model.
        sizes: numbers of values of its parameters, by the name of each; those that are tied share a key.
    """

    folder: Path
    task: TaskKind
    trust_remote_code: bool
    head: nn.Module | None
    arguments: dict[str, Any]
    sizes: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, folder: Path, model: LoadedModel, *, trust_remote_code: bool) -> LibraryModel:
        """The same folder, with the head that a loaded model has; called before the model is captured."""
        module = model.module
        head = copy.deepcopy(module.head) if isinstance(module, Classifier) else None
        sizes = {
            name: (id(parameter), parameter.numel())
            for name, parameter in module.named_parameters(remove_duplicate=False)
        }
        return cls(folder, model.task, trust_remote_code, head, module.arguments, sizes)

    def blocks(self, segments: Sequence[SegmentGraph]) -> int:
        """How many blocks the library loads, from the first on: what ``LIBRARY_BYTES`` holds, one at least."""
        first, *blocks, last = segments
        seen: dict[int, int] = {}
        for segment in (first, last):
            seen.update(self._sizes(segment))
        for count, block in enumerate(blocks):
            seen.update(self._sizes(block))
            if 4 * sum(seen.values()) > LIBRARY_BYTES and count > 0:
                return count
        return len(blocks)

    def outputs(self, batch: Batch, head: Mapping[str, Tensor], blocks: int | None) -> Tensor:
        """Loss (B,) of a language model, by the library's own function, or logits (B, C) of a classifier.

        Args:
            batch: texts.
            head: values of the head, by parameter name within it.
            blocks: number of blocks to load, from the first on; None for all.

        Raises:
            ModelError: transformers cannot load the folder, or does not find all weights in it.
        """
        base = self._load(blocks)
        rows = []
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            ids = torch.from_numpy(row[None, : int(mask.sum())])
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.arguments}
            if self.head is None:
                rows.append(base(**given, labels=ids).loss)
                continue
            hidden = base(**given).last_hidden_state
            inputs = (hidden, given["attention_mask"], torch.zeros(1, dtype=torch.int64))
            rows.append(torch.func.functional_call(self.head, dict(head), inputs)[1][0])
        return torch.stack(rows)

    def _sizes(self, segment: SegmentGraph) -> dict[int, int]:
        return dict(self.sizes[source] for source in segment.weights.values() if source in self.sizes)

    def _load(self, blocks: int | None) -> PreTrainedModel:
        kind = AutoModelForCausalLM if self.task == "causal_lm" else AutoModel
        try:
            config = AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=self.trust_remote_code
            )
            if blocks is not None:
                _shorten(config, blocks)
            options: dict[str, Any] = {}
            if getattr(config, "quantization_config", None):
                options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
            base, report = kind.from_pretrained(
                self.folder,
                config=config,
                local_files_only=True,
                trust_remote_code=self.trust_remote_code,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # the library raises nothing narrower for folders it cannot use
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{self.folder} cannot be loaded by transformers: {reason}") from error
        if missing := sorted(name for name in report["missing_keys"] if not name.startswith(UNUSED)):
            raise ModelError(
                f"transformers itself finds no {missing[0]} in {self.folder}, of {len(missing)} tensors; "
                "save the model again with save_pretrained"
            )
        loaded: PreTrainedModel = base.eval()
        return loaded


def check_against_library(library: LibraryModel, stored: StoredModel, batch: Batch) -> float:
    """Compare the captured model, on the folder's weights, with the one that transformers loads.

    Args:
        library: how transformers loads the folder.
        stored: captured model.
        batch: texts to run both on.

    Returns:
        The largest difference, relative to the largest value.

    Raises:
        ModelError: transformers cannot load the folder, or the two disagree beyond the limit.
    """
    count = library.blocks(stored.plain)
    whole = count == len(stored.plain) - 2
    segments = stored.plain if whole else (*stored.plain[: 1 + count], stored.plain[-1])
    reference = TorchReference(segments, stored.tensors)
    values = {
        name: value if name.startswith(f"{HEAD}.") else torch.zeros_like(value)
        for name, value in perturbed(reference).items()
    }
    head = {
        name.removeprefix(f"{HEAD}."): value for name, value in values.items() if name.startswith(f"{HEAD}.")
    }
    with torch.no_grad():
        found = reference.run(torch_inputs(batch), values)["loss" if library.head is None else "logits"]
        expected = library.outputs(batch, head, None if whole else count)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < LIBRARY_LIMIT:
        raise ModelError(
            f"{library.folder} as read here disagrees with the model that transformers loads from it, by "
            f"{difference:.1e}, limit {LIBRARY_LIMIT:.0e}; nothing was written. Load the model with transformers, save "
            "it with save_pretrained and export that folder; please report it if that does not help"
        )
    return difference


def _shorten(config: Any, blocks: int) -> None:
    """Let a configuration have its first blocks alone."""
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    config.num_hidden_layers = blocks
