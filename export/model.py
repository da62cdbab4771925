"""Load a Hugging Face folder and give it slices and a classification head.

Everything frozen keeps its name from the folder; what is trained is added beside it, so that the result
can go back to ``peft`` under the names ``peft`` expects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from edge_runtime.errors import ModelError
from export.model_folder import require_finite

HEAD = "head"
SliceKind = Literal["lora_xs", "lora"]


@dataclass(frozen=True)
class SliceOptions:
    """Which slices to attach.

    Attributes:
        kind: ``lora_xs`` (a trained r×r core between frozen SVD factors; Bałazy et al. 2024,
            arXiv 2405.17604, section 3) or ``lora`` (Hu et al. 2021, arXiv 2106.09685, section 4.1).
        rank: r.
        alpha: LoRA's scale numerator; the update is multiplied by alpha / rank.
        targets: module names as ``peft``'s ``target_modules``: a name or a dotted suffix of it.
        seed: of LoRA's random A.
    """

    kind: SliceKind = "lora_xs"
    rank: int = 4
    alpha: float = 4.0
    targets: tuple[str, ...] = ("query", "value")
    seed: int = 0


class SlicedLinear(nn.Module):
    """A frozen linear layer plus a trained slice.

    Slice tensors carry a leading axis of length 1. It is the example axis: a tangent may be longer there,
    one direction per example (see ``export.dual``).
    """

    def __init__(self, linear: nn.Linear, options: SliceOptions, generator: torch.Generator) -> None:
        super().__init__()
        rank, scale = options.rank, options.alpha / options.rank
        if rank > min(linear.in_features, linear.out_features):
            raise ModelError(
                f"rank {rank} exceeds the sides {linear.out_features}x{linear.in_features} of the target layer; "
                "choose a smaller --rank"
            )
        self.linear = linear
        if options.kind == "lora_xs":
            left, singular, right = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
            self.register_buffer("up", (left[:, :rank] * singular[:rank] * scale).float().contiguous())
            self.register_buffer("down", right[:rank].float().contiguous())
            self.core = nn.Parameter(torch.zeros(1, rank, rank))
        else:
            bound = linear.in_features**-0.5
            a = torch.rand(1, rank, linear.in_features, generator=generator) * 2 * bound - bound
            self.register_buffer("scale", torch.tensor(scale))
            self.A = nn.Parameter(a)
            self.B = nn.Parameter(torch.zeros(1, linear.out_features, rank))
        self.kind = options.kind

    # Buffers and parameters are declared for the type checker; which exist depends on the kind.
    up: Tensor
    down: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + up·core·down·x, or + scale·B·A·x; x has shape (B, T, in)."""
        if self.kind == "lora_xs":
            inner = torch.matmul(nn.functional.linear(x, self.down), self.core.transpose(-1, -2))
            return torch.add(self.linear(x), nn.functional.linear(inner, self.up))
        inner = torch.matmul(x, self.A.transpose(-1, -2))
        return torch.add(self.linear(x), torch.matmul(inner, self.B.transpose(-1, -2)) * self.scale)


class Head(nn.Module):
    """Linear classifier over mean-pooled, length-normalised features.

    Pooling averages the last hidden states of real tokens. The feature is scaled to length
    sqrt(hidden size), so that one learning rate suits every encoder.
    """

    def __init__(self, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, hidden_size))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.hidden_size = hidden_size

    def forward(self, hidden: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Loss and what the exact head gradient needs.

        Args:
            hidden: (B, T, H). attention_mask: (B, T), 1 for real tokens. labels: (B,) class indices.

        Returns:
            ``loss`` (B,); ``logits`` (B, C); ``residual`` = softmax - onehot = ∂loss/∂logits (B, C);
            ``features`` (B, H). The gradient for one example is residualᵀ·features, and residual for the bias.
        """
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum([1]) / mask.sum([1])
        features = pooled * torch.rsqrt((pooled * pooled).mean([-1], keepdim=True))
        logits = torch.matmul(features, self.weight.transpose(0, 1)) + self.bias
        log_probabilities = torch.log_softmax(logits, -1)
        loss = -torch.gather(log_probabilities, 1, labels.unsqueeze(-1)).squeeze([-1])
        classes = torch.arange(logits.shape[-1], device=labels.device).unsqueeze(0)
        onehot = (classes == labels.unsqueeze(-1)).to(logits.dtype)
        return loss, logits, torch.exp(log_probabilities) - onehot, features


class Classifier(nn.Module):
    """An encoder with slices, and a head."""

    def __init__(self, encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """(B, T) ids and mask, (B,) labels; outputs as :meth:`Head.forward`."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden, attention_mask, labels)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LoadedModel:
    """A classifier ready for capture; ``blocks`` is the dotted path of its list of blocks."""

    classifier: Classifier
    blocks: str
    architecture: str
    hidden_size: int
    position_limit: int
    parameters: int
    sliced: tuple[str, ...]


def load_model(
    folder: Path, classes: int, options: SliceOptions, *, trust_remote_code: bool = False
) -> LoadedModel:
    """Load an encoder folder and attach slices and a zero head; its own Python code runs only if trusted.

    Raises:
        ModelError: not a model folder, a weight that is not finite, no recognisable block structure, or no module
            matches the targets; the message says what was looked for and what was found.
    """
    encoder, config = _load_encoder(folder, trust_remote_code)
    for name, weight in encoder.named_parameters():
        require_finite(name, weight)
    blocks = find_blocks(encoder)
    parameters = sum(p.numel() for p in encoder.parameters())
    sliced = attach_slices(encoder, blocks, options)
    classifier = Classifier(encoder, Head(config.hidden_size, classes)).eval()
    for name, parameter in classifier.named_parameters():
        parameter.requires_grad_(is_trainable(name))
    return LoadedModel(
        classifier=classifier,
        blocks=f"encoder.{blocks}",
        architecture=str(config.model_type),
        hidden_size=int(config.hidden_size),
        position_limit=_position_limit(encoder, config),
        parameters=parameters,
        sliced=sliced,
    )


def _position_limit(encoder: nn.Module, config: Any) -> int:
    """Longest sequence with a position for each token; RoBERTa counts positions from after its padding id."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    return int(getattr(config, "max_position_embeddings", 512))


def is_trainable(name: str) -> bool:
    """Whether a parameter of a :class:`Classifier` belongs to a slice or the head."""
    return name.startswith(f"{HEAD}.") or name.rsplit(".", 1)[-1] in ("core", "A", "B")


def find_blocks(encoder: nn.Module) -> str:
    """Dotted path of the list of equal blocks that holds most of the parameters.

    Raises:
        ModelError: there is no list of modules of one class.
    """
    found: dict[str, int] = {}
    for name, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(m) for m in module}) == 1:
            found[name] = sum(p.numel() for p in module.parameters())
    if not found:
        kinds = ", ".join(sorted({type(m).__name__ for m in encoder.children()}))
        raise ModelError(
            f"{type(encoder).__name__} has no block structure this exporter recognises: looked for a ModuleList "
            f"of blocks of one class, found only {kinds}"
        )
    return max(found, key=lambda name: found[name])


def attach_slices(encoder: nn.Module, blocks: str, options: SliceOptions) -> tuple[str, ...]:
    """Replace every targeted linear layer inside the blocks by a :class:`SlicedLinear`, in order.

    Raises:
        ModelError: a target matches no linear layer inside the blocks.
    """
    generator = torch.Generator().manual_seed(options.seed)
    linears = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{blocks}.")
    ]
    for target in options.targets:
        if not any(_matches(name, target) for name in linears):
            kinds = sorted({re.sub(rf"^{re.escape(blocks)}\.\d+\.", "", name) for name in linears}) or [
                "none"
            ]
            raise ModelError(
                f"target module {target!r} matches no linear layer of the blocks; they have {', '.join(kinds)}"
            )
    chosen = tuple(name for name in linears if any(_matches(name, target) for target in options.targets))
    for name in chosen:
        parent, _, child = name.rpartition(".")
        linear = encoder.get_submodule(name)
        if isinstance(linear, nn.Linear):
            setattr(encoder.get_submodule(parent), child, SlicedLinear(linear, options, generator))
    return chosen


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _load_encoder(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, Any]:
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        encoder, found = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # the libraries raise nothing narrower for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} cannot be loaded by transformers: {reason}") from error
    # The pooler is not part of what is exported; anything else that is missing would be random numbers.
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
        raise ModelError(
            f"{folder} lacks {len(missing)} tensors of its architecture, the first is {missing[0]}; "
            "download or save the model again"
        )
    return encoder.eval(), config
