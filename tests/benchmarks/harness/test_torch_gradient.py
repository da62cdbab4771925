import numpy as np

from benchmarks.harness.torch_gradient import slice_gradient
from tests.export import tiny


def test_the_gradient_is_the_mean_over_examples_of_the_slices_asked_for(exported) -> None:
    """It equals the mean of the examples' own gradients, for the slices asked for and no others."""
    reference = exported.reference
    batch = tiny.make_text_batch(exported.package)
    slices = tiny.moved_slices(reference)
    wanted = [spec.name for spec in exported.package.manifest.slices if ".1." in spec.name]
    outputs, gradient = slice_gradient(reference, batch, tiny.flat(slices), wanted)
    loss, expected = reference.example_gradients(tiny.torch_batch(batch), slices)
    means = {name: value.mean(axis=0, keepdims=True) for name, value in tiny.flat(expected).items()}
    assert {name.partition("/")[0] for name in gradient} == set(wanted)
    for name, value in gradient.items():
        np.testing.assert_allclose(value, means[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(outputs["loss"].detach().numpy(), loss.numpy(), rtol=1e-6)
