"""The layers that make queries and values, whatever their names and whatever else a block holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from export.model.attention import query_and_value_layers
from export.model.load import find_blocks
from tests.export import tiny

WIDTH, HEADS = 16, 2


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


class Attention(nn.Module):
    """An attention of layers called as the test says; ``attend`` combines queries, keys and values."""

    def __init__(self, names: tuple[str, ...], attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.names, self.attend = names, attend
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH * (3 if len(names) == 2 else 1)))
        self.add_module(names[-1], nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        made = [self.get_submodule(name)(x) for name in self.names[:-1]]
        query, key, value = made if len(made) == 3 else made[0].split(WIDTH, -1)
        mixed = self.attend(heads(query), heads(key), heads(value)).transpose(1, 2)
        return self.get_submodule(self.names[-1])(mixed.reshape(x.shape))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, called: str) -> None:
        super().__init__()
        self.add_module(called, attention)
        self.called = called
        self.norm = nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.get_submodule(self.called)(self.norm(x))
        return x + self.narrow(torch.relu(self.wide(x)))


class Model(nn.Module):
    def __init__(
        self,
        names: tuple[str, ...],
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        called: str = "mixer",
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Block(Attention(names, attend), called) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def softmax_of_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.transpose(-1, -2), -1) @ value


def keys_first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax((query * 0.5).matmul(key.mT).masked_fill(torch.ones(1) > 2, -1e4), -1).matmul(value)


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.relu(query) @ (torch.relu(key).transpose(-1, -2) @ value)


def chosen(model: nn.Module, blocks: str = "blocks") -> list[str]:
    """The layers found in the first block, by their names there."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{blocks}.")]
    found = query_and_value_layers(model, blocks, linears)
    first = [name.removeprefix(f"{blocks}.0.") for name in found if name.startswith(f"{blocks}.0.")]
    assert len(found) == len(first) * len(list(model.get_submodule(blocks).children()))
    return first


@pytest.mark.parametrize("attend", [softmax_of_products, keys_first])
def test_queries_and_values_are_found_by_what_they_feed(attend) -> None:
    """Names say nothing here: what is compared first and what is averaged is found, keys and the rest are not."""
    model = Model(("alpha", "beta", "gamma", "delta"), attend)
    assert chosen(model) == ["mixer.alpha", "mixer.gamma"]
    assert chosen(Model(("value", "query", "key", "out"), attend)) == ["mixer.value", "mixer.key"]


def test_a_layer_that_makes_all_three_is_found_once() -> None:
    """A fused projection is query and value at once."""
    assert chosen(Model(("everything", "out"), softmax_of_products)) == ["mixer.everything"]


def test_attention_without_softmax_gives_all_its_input_projections() -> None:
    """Linear attention in a module called attention: every layer that reads its input, and not the one that leaves."""
    model = Model(("a", "b", "c", "d"), linear_attention, "self_attn")
    assert chosen(model) == ["self_attn.a", "self_attn.b", "self_attn.c"]


def test_what_has_no_attention_has_no_such_layers() -> None:
    """Without softmax and without a name that says attention nothing is found, in FNet for one."""
    config = AutoConfig.for_model(
        "fnet", hidden_size=16, num_hidden_layers=1, intermediate_size=16, vocab_size=20
    )
    assert chosen(AutoModel.from_config(config).eval(), "encoder.layer") == []


def test_parameters_need_no_values_and_the_model_is_left_as_it_was() -> None:
    """It runs on a model whose parameters have no memory, and takes its hooks away."""
    with torch.device("meta"):
        model = Model(("a", "b", "c", "d"), softmax_of_products)
    assert chosen(model) == ["mixer.a", "mixer.c"]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("family", "task", "expected"),
    [
        ("bert", "classification", ["attention.self.query", "attention.self.value"]),
        ("distilbert", "classification", ["attention.q_lin", "attention.v_lin"]),
        ("albert", "classification", None),
        ("llama", "causal_lm", ["self_attn.q_proj", "self_attn.v_proj"]),
        ("opt", "causal_lm", ["self_attn.v_proj", "self_attn.q_proj"]),
        ("phi3", "causal_lm", ["self_attn.qkv_proj"]),
    ],
)
def test_families_of_transformers(family: str, task, expected: list[str] | None) -> None:
    """What peft adapts by default in these families; in ALBERT the one block is called three times."""
    model = tiny.make_model(family, task, vocab_size=30).eval()
    if expected is None:
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        found = query_and_value_layers(model, find_blocks(model), linears)
        assert [name.rpartition(".")[2] for name in found] == ["query", "value"]
        return
    assert chosen(model, find_blocks(model)) == expected
