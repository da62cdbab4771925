"""Top-k activations: what is kept, whose tangent it has, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from edge_runtime.errors import ModelError
from export.autodiff.dual import ZERO, DualInterpreter
from export.model.top_activations import TopActivations, keep_top_activations, largest, pick, place


def entries(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def graph_of(kept: int, width: int) -> fx.GraphModule:
    """Top-k GELU as a captured graph has it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    index = graph.call_function(largest, (x, kept))
    chosen = graph.call_function(torch.ops.aten.gelu.default, (graph.call_function(pick, (x, index)),))
    graph.output((graph.call_function(place, (chosen, index, width)),))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.ReLU()])
def test_with_all_kept_nothing_changes(activation: nn.Module) -> None:
    """k as large as the part gives the bits of the activation function itself."""
    x = entries(2, 3, 8)
    assert torch.equal(TopActivations(activation, 8, 8)(x), activation(x))


def test_the_largest_of_each_token_are_kept() -> None:
    """Of each token the k largest activations stay, and all others are zero."""
    x = entries(2, 3, 8)
    whole, kept = nn.functional.relu(x), TopActivations(nn.ReLU(), 2, 8)(x)
    assert torch.equal(kept.topk(2, dim=-1).values, whole.topk(2, dim=-1).values)
    assert int((kept != 0).sum(-1).max()) <= 2
    assert torch.equal(kept[kept != 0], whole[kept != 0])


def test_a_tangent_takes_its_values_mask() -> None:
    """Each draw's tangent is zero where the value is, and elsewhere the activation function's own."""
    x, dots = entries(2, 3, 8), entries(4, 2, 3, 8)
    ((value, tangent),) = DualInterpreter(graph_of(3, 8)).run_dual([x], [dots])
    mask = torch.zeros_like(x).scatter(-1, x.topk(3, dim=-1).indices, 1.0)
    torch.testing.assert_close(value, nn.functional.gelu(x) * mask)
    for draw in range(4):
        whole = torch.func.jvp(nn.functional.gelu, (x,), (dots[draw],))[1]
        torch.testing.assert_close(tangent[draw], whole * mask)
    assert DualInterpreter(graph_of(3, 8)).run_dual([x], [ZERO])[0][1] is ZERO


class Block(nn.Module):
    """A block with a feed-forward part of 8, and an attention with an activation function of its own."""

    def __init__(self, *activations: nn.Module) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.gate = nn.SiLU()
        self.mlp = nn.Module()
        for number, each in enumerate(activations):
            setattr(self.mlp, f"act_{number}", each)


def model_of(*activations: nn.Module) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(*activations), Block(*activations)])
    return model


def test_each_block_s_feed_forward_part_is_found() -> None:
    """The activation function outside attention is wrapped in every block; attention's own is left alone."""
    model = model_of(nn.GELU())
    assert keep_top_activations(model, "blocks", 3, 8) == 2
    for block in model.get_submodule("blocks").children():
        assert isinstance(block.mlp.act_0, TopActivations)
        assert isinstance(block.self_attn.gate, nn.SiLU)


@pytest.mark.parametrize(
    ("activations", "kept", "width", "message"),
    [
        ((nn.GELU(),), 3, None, "names no width"),
        ((nn.GELU(),), 9, 8, "--mlp-topk is 9, and feed-forward parts have 8 activations; take fewer"),
        ((), 3, 8, "this model's have 0"),
        ((nn.GELU(), nn.ReLU()), 3, 8, "this model's have 2"),
        ((nn.Sigmoid(),), 3, 8, "this model has Sigmoid"),
        ((nn.Tanh(),), 3, 8, "this model has Tanh"),
    ],
)
def test_a_model_whose_parts_cannot_be_told_is_refused(
    activations: tuple[nn.Module, ...], kept: int, width: int | None, message: str
) -> None:
    """No width, too few activations, none or several functions, and functions that do not vanish below: one line."""
    with pytest.raises(ModelError, match=message) as caught:
        keep_top_activations(model_of(*activations), "blocks", kept, width)
    assert "\n" not in str(caught.value)


def test_another_axis_than_the_part_s_is_refused() -> None:
    """An activation function that meets another width than config.json's is no feed-forward part's."""
    with pytest.raises(ModelError, match="takes 7 entries, and config"):
        TopActivations(nn.GELU(), 3, 8)(entries(2, 7))
