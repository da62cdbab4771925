"""How many activations of the feed-forward parts are not zero, and how many would have been positive, on real text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export.model.top_activations import largest, place
from export.packaging.torch_reference import TorchReference


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what goes into and comes out of top-k activations, for tokens that are no padding."""

    def __init__(self, real: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._real = real.reshape(-1) == 1
        self.positive: list[float] = []
        self.left: list[float] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is largest:
            self.positive.append(self._share(args[0] > 0))
        elif function is place:
            self.left.append(self._share(result != 0))
        return result

    def _share(self, entries: Tensor) -> float:
        return float(entries.reshape(len(self._real), -1)[self._real].float().mean())


def activation_density(reference: TorchReference, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """Shares of activations, means over all feed-forward parts.

    Args:
        reference: the segments in torch.
        inputs: a batch, as :meth:`TorchReference.run` takes it.

    Returns:
        The share that is not zero behind the choice, and the share of inputs above zero before it.
    """
    counter = _Counter(inputs["attention_mask"])
    with torch.no_grad(), counter:
        reference.run(inputs)
    return fmean(counter.left), fmean(counter.positive)
