"""The linear losses of hidden [B, T, D], with batch and sequence sharded over a mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of, put, structure
from plain_heads import plain_linear_cross_entropy
from test_parallel import (
    BIAS,
    CASES,
    DIRECTION,
    HIDDEN,
    INDICES,
    KERNEL,
    WEIGHTS,
    V,
    in_every_mode,
    on_one_device,
)

import softjax
from benchmarks import wire

pytestmark = pytest.mark.compiled_quickly

B, T = 2, 8  # the 16 rows of test_parallel

# What is sharded over which axes: batch, sequence, features and classes of the kernel.
FORMS = {
    "sequence": ({"s": 8}, None, "s", None, None),
    "both": ({"d": 2, "s": 4}, "d", "s", None, None),
    "classes": ({"d": 2, "s": 2, "c": 2}, "d", "s", None, "c"),
    "fsdp": ({"d": 2, "s": 2, "c": 2}, "d", "s", ("s", "d"), "c"),
    "one axis for two": ({"d": 2, "c": 4}, "d", "c", None, "c"),
}

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


def sequences(a):
    return np.asarray(a).reshape(B, T, *np.shape(a)[1:])


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_plain_loss_in_every_mode(form, case):
    """A mean with weights, and one cotangent a row; what is not over the mesh is brought there."""
    sizes, batch, sequence, features, classes = FORMS[form]
    mesh = mesh_of("explicit", **sizes)
    labels, cotangent, options = CASES[case]
    point = (
        put(mesh, sequences(HIDDEN), batch, sequence),
        put(mesh, KERNEL, features, classes),
        put(mesh, BIAS, classes),
    )
    labels, options = sequences(labels), dict(options)
    if "weights" in options:
        options["weights"] = sequences(options["weights"])
        labels = put(mesh, labels, batch, sequence)
    if np.ndim(cotangent):
        cotangent = put(mesh, sequences(cotangent), batch, sequence)
    with jax.set_mesh(mesh):
        actual = in_every_mode(softjax.linear_cross_entropy, labels, cotangent, options, *point)
    desired = on_one_device(case)
    for mode in desired:
        for a, b in zip(*map(jax.tree.leaves, (actual[mode], desired[mode])), strict=True):
            close(np.asarray(a).reshape(b.shape), b, err_msg=mode)
    for a, slope in zip(point, actual["gradient"], strict=True):
        assert jax.typeof(a).sharding == jax.typeof(slope).sharding


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("jitted", [True, False])
def test_losses_and_outputs_are_where_the_examples_are(jitted):
    mesh = mesh_of("explicit", d=2, s=2, c=2)
    hidden, labels = (put(mesh, sequences(a), "d", "s") for a in (HIDDEN, INDICES[:, 0]))
    kernel = put(mesh, KERNEL, None, "c")

    def of(hidden, kernel, labels):
        return (
            softjax.linear_cross_entropy(hidden, kernel, labels, z_loss=0.1),
            softjax.linear_logsumexp(hidden, kernel),
            softjax.linear_cross_entropy_outputs(hidden, kernel, labels, top_k=3),
        )

    actual = (jax.jit(of) if jitted else of)(hidden, kernel, labels)
    desired = of(HIDDEN, KERNEL, INDICES[:, 0])
    for a, b in zip(*map(jax.tree.leaves, (actual, desired)), strict=True):
        close(np.asarray(a).reshape(b.shape), b)
        assert jax.typeof(a).sharding.spec[:2] == ("d", "s")


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("batch", ["d", None])
def test_labels_come_to_hidden_from_elsewhere(batch):
    """Over the sequence, where hidden is over the batch or on no mesh; a sparse distribution."""
    mesh = mesh_of("explicit", d=2, s=4)
    k_best = INDICES, np.full(INDICES.shape, 0.4)
    labels = softjax.TopKLabels(*(put(mesh, sequences(a), None, "s") for a in k_best))
    hidden = sequences(HIDDEN) if batch is None else put(mesh, sequences(HIDDEN), batch)
    actual = jax.jit(softjax.linear_cross_entropy)(hidden, KERNEL, labels)
    desired = plain_linear_cross_entropy(
        jnp.asarray(HIDDEN), jnp.asarray(KERNEL), softjax.TopKLabels(*k_best)
    )
    close(np.asarray(actual).reshape(-1), desired)
    assert jax.typeof(actual).sharding.spec[:2] == ((None, "s") if batch is None else ("d", None))


@pytest.mark.x64_once(True)
@pytest.mark.parametrize(
    ("kind", "form"), [*(("explicit", form) for form in FORMS), ("auto", "both"), ("auto", "fsdp")]
)
def test_curvature_products_are_those_of_one_device(kind, form):
    """By every argument, with every option, and their derivative; on Auto axes nothing divides."""
    sizes, batch, sequence, features, classes = FORMS[form]
    mesh = mesh_of(kind, **sizes)
    keep = (slice(None), slice(T if kind == "explicit" else T - 1))
    v = V if kind == "explicit" else V - 3
    hidden, weights = sequences(HIDDEN)[keep], sequences(WEIGHTS)[keep]
    point = hidden, KERNEL[:, :v], BIAS[:v]
    dots = sequences(DIRECTION[0])[keep], DIRECTION[1][:, :v], DIRECTION[2][:v]
    options = {"softcap": 3.0, "temperature": 0.7}
    if kind == "auto":
        said = {"class_axis": classes or (), "feature_axis": features}
        places = (), (), ()
    else:
        said, places = {}, ((batch, sequence), (features, classes), (classes,))

    def of(point, dots, weights, **said):
        def product(*point):
            hidden, kernel, bias = point
            return softjax.linear_cross_entropy_ggn_vp(
                hidden, kernel, dots, bias, weights=weights, **options, **said
            )

        return jax.jvp(product, point, dots)

    desired = jax.jit(of)(point, dots, weights)
    on_mesh = [
        tuple(put(mesh, a, *p) for a, p in zip(t, places, strict=True)) for t in (point, dots)
    ]
    with jax.set_mesh(mesh):
        actual = jax.jit(partial(of, **said))(*on_mesh, weights)
    jax.tree.map(close, actual, desired)
    if kind == "explicit":
        for a, product in zip(on_mesh[0], actual[0], strict=True):
            assert jax.typeof(a).sharding == jax.typeof(product).sharding


# The figures: value and gradient of a mean in float32, on 8 devices.
LARGE = 16, 64, 256, 8192


@pytest.mark.x64_once
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("explicit", "sequence"),
        ("explicit", "both"),
        ("explicit", "classes"),
        ("explicit", "fsdp"),
        ("auto", "both"),
        ("auto", "classes"),
        ("auto made explicit", "both"),
    ],
)
def test_what_goes_over_the_wire(kind, form):
    """dX over the classes and dW over the rows, once; four numbers a row: as of hidden [N, D].

    On Auto axes, where no trace sees that the sequence is sharded, every device also sends its
    own hidden and dX to others. Nothing gathers them.
    """
    b, t, d, v = LARGE
    sizes, batch, sequence, features, classes = FORMS[form]
    of_rows = sizes.get("d", 1) * sizes["s"]
    of_classes = sizes.get("c", 1)
    mesh = mesh_of("explicit" if kind == "explicit" else "auto", **sizes)
    arguments = (
        structure(mesh, (b, t, d), batch, sequence),
        structure(mesh, (d, v), features, classes),
        structure(mesh, (b, t), batch, sequence, dtype="int32"),
    )
    said = {"class_axis": classes or ()} if kind == "auto" else {}
    loss = partial(softjax.linear_cross_entropy, reduction="mean", **said)
    if kind == "auto made explicit":
        specs = tuple(a.sharding.spec for a in arguments)
        loss = jax.sharding.explicit_axes(loss, axes=tuple(sizes), in_sharding=specs)
    gradients = arguments[0].sharding, arguments[1].sharding
    step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, gradients))
    with jax.set_mesh(mesh):
        program = step.lower(*arguments).compile()
    sent, rows, width = wire.collectives(program), b * t // of_rows, v // of_classes
    assert all(one.times == 1 for one in sent if one.elements > 4 * rows)
    moved = [one for one in sent if one.kind == "all-to-all"]
    if kind != "auto":
        assert not moved
    kernel_bar = 4 * d * width * 2 * (of_rows - 1) / of_rows
    hidden_bar = 4 * d * rows * 2 * (of_classes - 1) / of_classes
    numbers = 4 * 4 * rows * 2 * (of_classes - 1) / of_classes
    rest = wire.wire_bytes(program) - sum(one.bytes for one in moved)
    assert rest <= kernel_bar + hidden_bar + numbers + 16
    assert sum(one.bytes for one in moved) <= 4 * (2 * d + 2) * rows
    gathered = [one.elements for one in sent if one.kind == "all-gather"]
    # Over one axis of the mesh after the other, each of two devices: what is sent is the same.
    assert gathered == ([] if features is None else [d * width // 2, d * width])


@pytest.mark.x64_once
def test_what_a_curvature_product_sends():
    """The products, both kernels once, and five numbers a row over the classes."""
    b, t, d, v = LARGE
    sizes, batch, sequence, features, classes = FORMS["fsdp"]
    mesh = mesh_of("explicit", **sizes)
    hidden = structure(mesh, (b, t, d), batch, sequence)
    kernel = structure(mesh, (d, v), features, classes)

    def products(hidden, kernel, *dots):
        return softjax.linear_cross_entropy_ggn_vp(hidden, kernel, (*dots, None))[:2]

    step = jax.jit(products, out_shardings=(hidden.sharding, kernel.sharding))
    program = step.lower(hidden, kernel, hidden, kernel).compile()
    rows, width = b * t // 4, v // 2
    kernel_bytes = 4 * d * width * 3 / 4  # of which each of four devices sends or takes three parts
    most = {"all-reduce": 4 * (rows * d + 5 * rows)}
    most |= {"all-gather": 2 * kernel_bytes, "reduce-scatter": kernel_bytes}
    sent = wire.collectives(program)
    for kind, bar in most.items():
        assert sum(one.bytes for one in sent if one.kind == kind) <= bar
    assert {one.kind for one in sent} == set(most)
    assert wire.largest_array(program) == d * width
