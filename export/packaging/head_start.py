"""What a package's head starts from: the folder's own classifier if it can be trained further, else zero.

It is trained further only if it computes here what transformers makes of the folder. The library loads the folder by
itself, with ``AutoModelForSequenceClassification``, and so does not share a mistake of this program's reading. Of a
large model both sides run the first block alone, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from edge_runtime.data.batches import make_batch
from export.model.features import choose_features, not_used
from export.model.load import LoadedModel
from export.model.own_head import UnusableHead
from export.packaging.programs import Progress
from export.packaging.self_check import STRICT_LIMIT, WHOLE_BYTES, torch_inputs
from export.packaging.torch_reference import TorchReference
from export.quantisation.stored import StoredModel, store

BYTES_PER_FLOAT = 4


class HeadStart:
    """Loads a folder's model with the head that training starts from.

    Args:
        folder: model folder.
        labels: label set, in order; empty for a causal language model.
        load: function that loads the model, of ``features`` and ``rows`` as :func:`export.model.load.load_model` has
            them.
        trust_remote_code: whether Python code of the folder's own may run.
        brought: sentence for people that says that the folder's classifier came with an adapter; None where it did not.

    Raises:
        ModelError: a file that says how features are made cannot be read, or contradicts itself.
    """

    def __init__(
        self,
        folder: Path,
        labels: tuple[str, ...],
        load: Callable[..., LoadedModel],
        *,
        trust_remote_code: bool,
        brought: str | None = None,
    ) -> None:
        self._folder = folder
        self._choice = choose_features(folder, labels)
        self._load = load
        self._trust_remote_code = trust_remote_code
        self._brought = brought
        self._unused: str | None = None

    def load(self) -> LoadedModel:
        """The model, with the folder's own classifier if that can be trained further.

        Raises:
            ModelError: the model cannot be loaded.
        """
        if self._choice.rows is not None:
            try:
                return self._load(features="own", rows=self._choice.rows)
            except UnusableHead as reason:
                self._unused = str(reason)
        return self._load(features=self._choice.features)

    def again(self, model: LoadedModel, mlp_topk: int) -> LoadedModel:
        """The same model with the same head, whose feed-forward parts keep so many activations.

        Raises:
            ModelError: the feed-forward parts cannot be told, or have fewer.
        """
        return self._load(features=model.features, rows=model.rows, mlp_topk=mlp_topk)

    def settle(
        self,
        model: LoadedModel,
        stored: StoredModel,
        quantisation: str,
        ids: list[list[int]],
        progress: Progress,
    ) -> tuple[LoadedModel, StoredModel]:
        """Compare the folder's own classifier with the library's, and tell what the head starts from.

        Args:
            model: model from :meth:`load`.
            stored: same model, captured.
            quantisation: format of its frozen matrices.
            ids: tokens of some texts to compare on.
            progress: called with a sentence for people about each thing that is taken or not used.

        Returns:
            Both as they were; or, if the classifier differs, loaded and captured again with a fresh head.
        """
        if model.features == "own":
            progress("Comparing the classifier with the one that transformers loads")
            self._unused = self._why_different(model, stored, ids)
            if self._unused is not None:
                model = self._load(features=self._choice.features)
                stored = store(model, quantisation)
        whose = "folder's own" if self._brought is None else "adapter's"
        own = self._brought or self._choice.own
        if self._unused is not None:
            own = not_used(self._unused, whose)
        for sentence in (own, *(() if model.features == "own" else self._choice.pooled)):
            if sentence is not None:
                progress(sentence)
        return model, stored

    def _why_different(self, model: LoadedModel, stored: StoredModel, ids: list[list[int]]) -> str | None:
        """Why logits of the float model with the folder's classifier are not the library's; None if they are."""
        whole = model.parameters * BYTES_PER_FLOAT <= WHOLE_BYTES
        segments = stored.plain if whole else (*stored.plain[:2], stored.plain[-1])
        batch = torch_inputs(make_batch(ids, [0] * len(ids), pad_token_id=0))
        ours = TorchReference(segments, stored.tensors).run(batch)["logits"]
        try:
            theirs = _library_logits(self._folder, ids, None if whole else 1, self._trust_remote_code)
        except Exception as error:  # noqa: BLE001 - for folders that it cannot run the library raises anything
            return (
                f"transformers cannot run it: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
            )
        theirs = theirs[:, list(self._choice.rows or ())]
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        if difference < STRICT_LIMIT:
            return None
        return f"its logits here differ from transformers' by {difference:.1e}, limit {STRICT_LIMIT:.0e}"


def _library_logits(
    folder: Path, ids: list[list[int]], blocks: int | None, trust_remote_code: bool
) -> Tensor:
    """Logits (B, C) of the model as the library loads it, row by row and so without padding."""
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **given)
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:blocks]
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", **given
    ).eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in ids])
