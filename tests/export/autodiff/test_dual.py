"""The dual interpreter over whole captured models, against backpropagation."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export.autodiff.dual import ZERO, DualInterpreter, MissingRuleError, Tangent, Zero
from export.capture.record import Capture
from export.capture.segment import SegmentGraph
from export.lowering.onnx import lower
from export.lowering.trace import ProgramKind, trace
from export.packaging.torch_reference import TorchReference
from tests.export import decoder, tiny

#: float64 throughout, so only rounding is left: backpropagation and forward mode sum in another order.
LIMIT = 1e-9


@pytest.fixture(scope="module", params=[("lora_xs", "int8"), ("lora", "none")], ids="-".join)
def model(request, tiny_model, tmp_path_factory) -> tuple[Capture, TorchReference]:
    """The captured tiny model in float64."""
    kind, quantisation = request.param
    chosen = tiny.options(tiny_model, tmp_path_factory.mktemp("none"), kind=kind, quantisation=quantisation)
    stored, _ = tiny.store_model(chosen)
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in stored.in_memory().items()}
    return Capture(stored.segments, tensors, {}), TorchReference(stored.segments, tensors)


def batch_of(model: tuple[Capture, TorchReference], rows: int = 3, tokens: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, tokens // 2 :] = 0
    return {
        "input_ids": torch.randint(5, 60, (rows, tokens), generator=generator),
        "attention_mask": mask,
        "labels": torch.arange(rows) % len(tiny.LABELS),
    }


def sweep(
    captured: Capture, inputs: dict[str, Tensor], slices: dict[str, Tensor], dots: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tangent]]:
    """All segments in turn on pairs; ``dots`` by trainable name, absent ones ZERO."""
    given = {**captured.tensors, **slices}
    flow: dict[str, tuple[Tensor, Tangent]] = {name: (value, ZERO) for name, value in inputs.items()}
    for segment in captured.segments:
        sources = [*segment.slices.values(), *segment.weights.values()]
        pairs = [flow[name] for name in segment.values]
        pairs += [(given[source], dots.get(source, ZERO)) for source in sources]
        primals, tangents = zip(*pairs, strict=True)
        results = DualInterpreter(segment.module()).run_dual(primals, tangents)
        flow.update(zip(segment.outputs, results, strict=True))
    return flow


def directions(
    reference: TorchReference, draws: int, batch: int, seed: int = 9, only: str = ""
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(draws, batch, *reference.tensors[name].shape[1:], generator=generator).double()
        for name in reference.trainable
        if not name.startswith("head.") and only in name
    }


def backprop(
    reference: TorchReference, inputs: dict[str, Tensor], slices: dict[str, Tensor], dots: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    loss, gradients = reference.example_gradients(inputs, slices)
    return loss, sum((gradients[name] * dot).flatten(2).sum(-1) for name, dot in dots.items())


def moved(reference: TorchReference) -> dict[str, Tensor]:
    return {name: value.double() for name, value in tiny.moved_slices(reference).items()}


@pytest.mark.parametrize("draws", [1, 3])
def test_the_jvp_of_each_example_is_its_gradient_times_its_direction(model, draws: int) -> None:
    """Per-example tangents through the whole model give each example's g·v, g by backpropagation."""
    captured, reference = model
    inputs, slices = batch_of(model), moved(reference)
    dots = directions(reference, draws, 3)
    loss, dot = sweep(captured, inputs, slices, dots)["loss"]
    expected_loss, expected = backprop(reference, inputs, slices, dots)
    assert dot.shape == (draws, 3)
    assert (loss - expected_loss).abs().max() <= LIMIT * expected_loss.abs().max()
    assert (dot - expected).abs().max() <= LIMIT * expected.abs().max()


def test_a_direction_shared_by_the_batch_is_the_same_direction_for_each(model) -> None:
    """A tangent of example axis 1 equals the same tangent repeated for each example."""
    captured, reference = model
    inputs, slices = batch_of(model), moved(reference)
    shared = directions(reference, 2, 1)
    repeated = {name: dot.expand(-1, 3, *dot.shape[2:]) for name, dot in shared.items()}
    one = sweep(captured, inputs, slices, shared)["loss"][1]
    many = sweep(captured, inputs, slices, repeated)["loss"][1]
    torch.testing.assert_close(one, many, rtol=LIMIT, atol=1e-12)


def test_draws_do_not_mix(model) -> None:
    """Three directions at once give what each gives alone."""
    captured, reference = model
    inputs, slices = batch_of(model), moved(reference)
    dots = directions(reference, 3, 3)
    together = sweep(captured, inputs, slices, dots)["loss"][1]
    for k in range(3):
        alone = sweep(captured, inputs, slices, {name: dot[k : k + 1] for name, dot in dots.items()})["loss"][
            1
        ]
        torch.testing.assert_close(together[k : k + 1], alone, rtol=LIMIT, atol=1e-12)


def test_examples_do_not_mix(model) -> None:
    """Another direction for one example leaves the other examples' jvps as they are."""
    captured, reference = model
    inputs, slices = batch_of(model), moved(reference)
    dots = directions(reference, 1, 3)
    changed = {name: dot.clone() for name, dot in dots.items()}
    for dot in changed.values():
        dot[:, 1] *= -2
    before = sweep(captured, inputs, slices, dots)["loss"][1]
    after = sweep(captured, inputs, slices, changed)["loss"][1]
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]], rtol=LIMIT, atol=1e-12)
    torch.testing.assert_close(after[:, 1], -2 * before[:, 1], rtol=1e-8, atol=1e-12)


def test_what_precedes_the_first_moving_slice_has_no_tangent(model) -> None:
    """With tangents in the second block only, the first block's hidden state carries none."""
    captured, reference = model
    inputs, slices = batch_of(model), moved(reference)
    dots = directions(reference, 1, 3, only="layer.1.")
    flow: dict[str, tuple[Tensor, Tangent]] = {name: (value, ZERO) for name, value in inputs.items()}
    given = {**captured.tensors, **slices}
    seen = {}
    for segment in captured.segments:
        pairs = [flow[name] for name in segment.values]
        pairs += [
            (given[s], dots.get(s, ZERO)) for s in (*segment.slices.values(), *segment.weights.values())
        ]
        results = DualInterpreter(segment.module()).run_dual(*zip(*pairs, strict=True))
        flow.update(zip(segment.outputs, results, strict=True))
        seen[segment.name] = flow["hidden"][1]
    assert isinstance(seen["embedding"], Zero)
    assert isinstance(seen["block_0"], Zero)
    assert isinstance(seen["block_1"], Tensor)
    expected = backprop(reference, inputs, slices, dots)[1]
    torch.testing.assert_close(flow["loss"][1], expected, rtol=1e-8, atol=1e-12)


class CountCalls(TorchDispatchMode):
    """Counts the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_zero_tangents_run_no_operator(model) -> None:
    """A sweep without tangents runs exactly the operators of the plain model."""
    captured, reference = model
    inputs, slices = batch_of(model), moved(reference)
    with CountCalls() as plain, torch.no_grad():
        expected = reference.run(inputs, slices)
    with CountCalls() as dual, torch.no_grad():
        flow = sweep(captured, inputs, slices, {})
    assert dual.calls == plain.calls
    assert torch.equal(flow["loss"][0], expected["loss"])
    assert isinstance(flow["loss"][1], Zero)


def test_a_frozen_matrix_is_used_once_for_all_draws(model) -> None:
    """The number of operators does not depend on the number of draws: they are rows of one product."""
    captured, reference = model
    inputs, slices = batch_of(model), moved(reference)
    counts = []
    for draws in (1, 3):
        with CountCalls() as counted, torch.no_grad():
            sweep(captured, inputs, slices, directions(reference, draws, 3))
        # Views and copies depend on memory layout, arithmetic does not.
        counts.append({n: c for n, c in counted.calls.items() if "view" not in n and "clone" not in n})
    assert counts[0] == counts[1]


def test_a_missing_rule_in_a_model_names_operator_and_node(model) -> None:
    """An operator without a rule in the middle of a block is named together with its node."""
    captured, reference = model
    segment = captured.segments[1]
    graph = torch.fx.Graph()
    graph.graph_copy(segment.graph, mapping := {})
    outputs = [mapping[node] for node in next(n for n in segment.graph.nodes if n.op == "output").args[0]]
    changed = graph.call_function(torch.ops.aten.sin.default, (outputs[0],))
    graph.output((changed,))
    inputs, slices = batch_of(model), moved(reference)
    flow = sweep(captured, inputs, slices, {})
    given = {**captured.tensors, **slices}
    sources = [*segment.slices.values(), *segment.weights.values()]
    embedded = sweep(Capture(captured.segments[:1], captured.tensors, {}), inputs, {}, {})
    primals = [embedded.get(name, flow[name])[0] for name in segment.values] + [given[s] for s in sources]
    dots = directions(reference, 1, 3)
    tangents = [ZERO] * len(segment.values) + [dots.get(s, ZERO) for s in sources]
    interpreter = DualInterpreter(torch.fx.GraphModule(torch.nn.Module(), graph))
    with pytest.raises(MissingRuleError, match=rf"aten\.sin\.default \(node {changed.name}\)"):
        interpreter.run_dual(primals, tangents)


def test_a_decoder_block_equals_torchs_jvp() -> None:
    """A Llama block (RMSNorm, rotary embedding, grouped-query attention, gated layer) in one piece, in float64."""
    captured, tensors = decoder.segment()
    for node in captured.graph.nodes:
        if node.target is torch.ops.aten.softmax.int:
            node.args = node.args[:2]  # The model asks for float32 here, whatever it is given.
    weights = [tensors[source].detach().double() for source in captured.weights.values()]
    hidden, *rest = (each.double() for each in decoder.inputs(decoder.block()[1], 2, 7))
    dots = torch.randn(3, *hidden.shape, generator=torch.Generator().manual_seed(6)).double()
    with torch.no_grad():
        ((value, tangent),) = DualInterpreter(captured.module()).run_dual(
            [hidden, *rest, *weights], [dots, *[ZERO] * (len(rest) + len(weights))]
        )
        expected = [
            torch.func.jvp(lambda h: captured.module()(h, *rest, *weights)[0], (hidden,), (dot,))
            for dot in dots
        ]
    torch.testing.assert_close(value, expected[0][0], rtol=LIMIT, atol=1e-12)
    torch.testing.assert_close(tangent, torch.stack([jvp for _, jvp in expected]), rtol=LIMIT, atol=1e-12)


def test_the_captured_decoder_block_is_the_models() -> None:
    """The segment that the other tests use computes what the model's own layer computes."""
    captured, tensors = decoder.segment()
    module, model = decoder.block()
    given = decoder.inputs(model, 2, 7)
    weights = [tensors[source] for source in captured.weights.values()]
    with torch.no_grad():
        torch.testing.assert_close(captured.module()(*given, *weights)[0], module(*given))


def lowered_nodes(segment: SegmentGraph, kind: ProgramKind, tensors: dict[str, Tensor]) -> Counter[str]:
    """Nodes of a lowered program by operator."""
    return Counter(node.op_type for node in lower(trace(segment, kind, tensors, tiny.POSITIONS)).graph)


def test_a_decoder_blocks_dual_repeats_only_what_its_primal_has() -> None:
    """Each Concat and each Expand occurs once for the value and once for its tangent, and nothing adds others."""
    captured, tensors = decoder.segment()
    primal, dual = (lowered_nodes(captured, kind, tensors) for kind in ("primal", "dual"))
    assert primal["Concat"] and primal["Expand"]
    assert dual["Concat"] <= 2 * primal["Concat"]
    assert dual["Expand"] <= 2 * primal["Expand"]
    assert sum(dual.values()) <= 3 * sum(primal.values())


def test_an_encoder_blocks_dual_has_no_concat_or_expand(tiny_model, tmp_path_factory) -> None:
    """The dual of a BERT block joins and repeats nothing, and uses each stored matrix twice: value and tangent."""
    captured, _ = tiny.store_model(tiny.options(tiny_model, tmp_path_factory.mktemp("none")))
    segment = captured.segments[1]
    traced = trace(segment, "dual", captured.tensors, tiny.POSITIONS)
    placeholders = [node for node in traced.exported.graph.nodes if node.op == "placeholder"]
    uses = {
        name: len(node.users)
        for name, node in zip(traced.inputs, placeholders, strict=True)
        if name.endswith("_levels")
    }
    assert len(uses) == 6
    assert set(uses.values()) == {2}
    dual = lowered_nodes(segment, "dual", captured.tensors)
    assert not dual.keys() & {"Concat", "Expand", "Shape", "Gather"}
