"""Arguments of a wrong kind raise errors of softjax, never of Python or JAX."""

import inspect
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import softjax
from softjax import calibration, choice, derivatives, information, regression

pytestmark = [pytest.mark.x64_once, pytest.mark.compiled_quickly]

X = jnp.zeros((4, 3))
Y = jnp.array([0, 1, 2, 0])
P = jnp.full((4, 3), 1 / 3)
S = jnp.zeros(4)

# What every argument of a kind refuses.
NO_ARRAY = [
    "text",
    None,
    {"a": 1},
    object(),
    [[1.0], [1.0, 2.0]],
    1j,
    np.array(["a"]),
    [None],
    {1},
    b"x",
]
NO_MASK = [value for value in NO_ARRAY if value is not None] + [1.0, jnp.zeros((4, 3))]
NO_OPTIONAL = [value for value in NO_ARRAY if value is not None]
NO_AXIS = ["0", 1.0, 7, (0, 0), [None], object(), 1j]
NO_INTEGER = ["1", 1.5, None, [1], object(), True, jnp.array([1, 2])]
SWITCHES = [True, False, np.True_, np.False_]  # where a number is expected
NO_FLAG = ["yes", None, 2, jnp.zeros(2), [True]]
NO_SCALAR = [*NO_ARRAY, *SWITCHES, jnp.zeros(1), jnp.zeros(3), [0.5, 0.5]]
NO_SCALAR_OR_NONE = [value for value in NO_SCALAR if value is not None]
NO_LABELS = [
    *NO_ARRAY,
    0.5,
    jnp.zeros((2, 2)),
    jnp.array([[0]]),
    Y == 0,
    [0, 1, 2],
    softjax.TopKLabels("text", P),
]

NORMALIZER = {"where": NO_MASK, "axis": NO_AXIS}
TEMPERED = NORMALIZER | {"temperature": NO_SCALAR}
ENTROPY = ({"logits": X}, {"logits": NO_ARRAY} | NORMALIZER)
TWO = (
    {"target_logits": X, "logits": X},
    {"target_logits": NO_ARRAY, "logits": NO_ARRAY} | NORMALIZER,
)
LOGITS = ({"logits": X}, {"logits": [*NO_ARRAY, 1.0]})
CALIBRATION = {
    "probabilities": NO_ARRAY,
    "labels": NO_LABELS,
    "num_bins": [*NO_INTEGER, 0],
    "adaptive": NO_FLAG,
    "sample_weights": [*NO_OPTIONAL, jnp.ones(3), -S - 1],
}
LOSS_OPTIONS = {
    "label_smoothing": [*NO_SCALAR, 2.0, -0.1],
    "class_weights": [*NO_OPTIONAL, jnp.ones(2), -jnp.ones(3)],
    "ignore_index": [value for value in NO_INTEGER if value is not None],
    "z_loss": [*NO_SCALAR, -1.0],
}
HEAD = {"hidden": X, "kernel": jnp.ones((3, 5))}
LINEAR = {
    "hidden": [*NO_ARRAY, 1.0],
    "kernel": [*NO_ARRAY, X],
    "bias": [*NO_OPTIONAL, jnp.ones(2)],
    "softcap": [*NO_SCALAR_OR_NONE, -1.0],
    "temperature": [*NO_SCALAR, 0.0],
    "max_temp_bytes": ["1", 1.5, 0, [1]],
}

# Function, what it is called with, and what is refused at each argument.
TABLE = {
    "logsumexp": (
        {"a": X},
        {
            "a": NO_ARRAY,
            "b": [*NO_OPTIONAL, jnp.ones(2)],
            "keepdims": NO_FLAG,
            "return_sign": NO_FLAG,
        }
        | NORMALIZER,
    ),
    "logmeanexp": ({"x": X}, {"x": NO_ARRAY, "keepdims": NO_FLAG} | NORMALIZER),
    **{
        name: ({"x": X}, {"x": NO_ARRAY} | TEMPERED)
        for name in ("softmax", "log_softmax", "softmin")
    },
    **{
        name: ({"x": X}, {"x": NO_ARRAY, "keepdims": NO_FLAG} | TEMPERED)
        for name in ("smooth_max", "smooth_min", "smooth_max_bounds")
    },
    "cross_entropy": (
        {"logits": X, "labels": Y},
        {
            "logits": [*NO_ARRAY, 1.0],
            "labels": NO_LABELS,
            "axis": [*NO_AXIS, None],
            "where": [*NO_MASK, Y == 0],
        }
        | LOSS_OPTIONS,
    ),
    "weighted_mean": (
        {"losses": S, "weights": S + 1},
        {"losses": NO_ARRAY, "weights": [*NO_OPTIONAL, jnp.ones(3), -S - 1]},
    ),
    "linear_cross_entropy": (
        HEAD | {"labels": Y},
        LINEAR
        | LOSS_OPTIONS
        | {
            "labels": NO_LABELS,
            "class_weights": [*NO_OPTIONAL, jnp.ones(2), -jnp.ones(5)],
            "reduction": ["average", None, 1, X],
            "weights": [*NO_OPTIONAL, jnp.ones(3), -S - 1],
        },
    ),
    "linear_logsumexp": (HEAD, LINEAR),
    "linear_cross_entropy_outputs": (
        HEAD,
        LINEAR | {"labels": [v for v in NO_LABELS if v is not None], "top_k": [*NO_INTEGER, 0, 6]},
    ),
    **{f"information.{name}": ENTROPY for name in ("entropy", "perplexity")},
    **{f"information.{name}": TWO for name in ("cross_entropy", "kl_divergence")},
    "information.surprisal": (
        {"logits": X, "labels": Y},
        {
            "logits": [*NO_ARRAY, 1.0],
            "labels": [*NO_LABELS, P],
            "where": NO_MASK,
            "axis": [*NO_AXIS, None],
        },
    ),
    "information.joint_entropy": (
        {"logits": X, "n": 2},
        {"logits": NO_ARRAY, "n": [*NO_INTEGER, -1]} | NORMALIZER,
    ),
    "information.temper": (
        {"logits": X, "alpha": 0.5},
        {"logits": NO_ARRAY, "alpha": NO_SCALAR} | NORMALIZER,
    ),
    "information.nats_to_bits": ({"nats": S}, {"nats": NO_ARRAY}),
    "information.bits_to_nats": ({"bits": S}, {"bits": NO_ARRAY}),
    "calibration.calibrate_temperature": (
        {"logits": X, "labels": Y},
        {
            "logits": [*NO_ARRAY, 1.0],
            "labels": NO_LABELS,
            "sample_weights": [*NO_OPTIONAL, jnp.ones(3), -S - 1],
        },
    ),
    "calibration.calibrate_vector": (
        {"logits": X, "labels": Y},
        {
            "logits": [*NO_ARRAY, 1.0],
            "labels": NO_LABELS,
            "l2": [*NO_SCALAR, -1.0],
            "sample_weights": [*NO_OPTIONAL, jnp.ones(3), -S - 1],
        },
    ),
    **{
        f"calibration.{name}": ({"probabilities": P, "labels": Y}, CALIBRATION)
        for name in (
            "reliability_diagram",
            "expected_calibration_error",
            "classwise_calibration_error",
        )
    },
    "choice.bradley_terry_probability": (
        {"score_i": S, "score_j": S},
        {
            "score_i": [*NO_ARRAY, jnp.zeros(3)],
            "score_j": NO_ARRAY,
            "neither": [*NO_OPTIONAL, *SWITCHES],
        },
    ),
    "choice.bradley_terry_loss": (
        {"score_i": S, "score_j": S, "outcome": Y % 2},
        {
            "score_i": [*NO_ARRAY, jnp.zeros(3)],
            "score_j": NO_ARRAY,
            "outcome": [*NO_ARRAY, 0.5, Y + 1, Y[:2]],
            "neither": [*NO_OPTIONAL, *SWITCHES],
        },
    ),
    "choice.plackett_luce_loss": (
        {"scores": X, "ranking": Y[:, None]},
        {
            "scores": [*NO_ARRAY, 1.0],
            "ranking": [*NO_ARRAY, 0.5, Y, Y[:, None] + 7],
            "where": [*NO_MASK, Y == 0],
        },
    ),
    **{
        f"derivatives.{name}": LOGITS
        for name in (
            "softmax_jacobian",
            "logsumexp_gradient",
            "logsumexp_hessian",
            "logsumexp_hessian_sqrt",
            "logsumexp_hessian_pinv",
        )
    },
    **{
        f"derivatives.{name}": (
            {"logits": X, v: X},
            {"logits": [*NO_ARRAY, 1.0], v: [*NO_ARRAY, S]},
        )
        for name, v in (
            ("softmax_jvp", "tangent"),
            ("softmax_vjp", "cotangent"),
            ("logsumexp_hvp", "v"),
        )
    },
    **{
        f"derivatives.{name}": (
            {"logits": X, "labels": Y},
            {"logits": [*NO_ARRAY, 1.0], "labels": NO_LABELS},
        )
        for name in ("cross_entropy_gradient", "cross_entropy_hessian")
    },
    "derivatives.cross_entropy_hvp": (
        {"logits": X, "labels": Y, "v": X},
        {"logits": [*NO_ARRAY, 1.0], "labels": NO_LABELS, "v": [*NO_ARRAY, S]},
    ),
    "derivatives.log_partition_cumulants": (
        {"logits": X, "direction": X},
        {"logits": [*NO_ARRAY, 1.0], "direction": [*NO_ARRAY, S], "order": [*NO_INTEGER, 0, 5]},
    ),
}


def function(name):
    module, _, name = name.rpartition(".")
    return getattr(getattr(softjax, module) if module else softjax, name)


@pytest.mark.parametrize("name", TABLE)
def test_what_is_no_argument_is_refused_by_its_name(name):
    """The error names the argument, and the function by the path at which it is imported."""
    given, refused = TABLE[name]
    function(name)(**given)
    wrong = []
    for argument, values in refused.items():
        for value in values:
            try:
                function(name)(**given | {argument: value})
            except (TypeError, ValueError) as error:
                said = str(error)
                named = said.startswith(f"softjax.{name}: `")
                # A shape can be refused at the argument that it does not fit.
                if named and (f"`{argument}" in said or "shape" in said or "rank" in said):
                    continue
                wrong.append((argument, value, f"{type(error).__name__}: {said[:90]}"))
            except Exception as error:
                wrong.append((argument, value, f"{type(error).__name__}: {str(error)[:90]}"))
            else:
                wrong.append((argument, value, "taken"))
    assert not wrong, "\n".join(map(str, wrong))


def test_the_table_has_every_function():
    modules = (calibration, choice, derivatives, information)
    public = {
        f"{module.__name__.removeprefix('softjax.')}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__.startswith(module.__name__)
        and not name.startswith("_")
    }
    assert public <= set(TABLE)


def test_the_function_that_was_called_refuses():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6) % 2
    for name, arguments in (
        ("fit", {}),
        ("fit_many", {"l2": [1.0, 2.0]}),
        ("fit_path", {"l2": [1.0]}),
        ("largest_l1", {}),
        ("bootstrap", {"resamples": 3}),
        ("cross_validate", {"l2": [1.0]}),
        ("train", {"optimizer": optax.sgd(0.1), "steps": 1}),
    ):
        for argument, value in (("class_weights", [1.0, -1.0]), ("sample_weights", np.zeros(6))):
            said = rf"^softjax\.regression\.{name}: `{argument}` "
            with pytest.raises(ValueError, match=said):
                getattr(regression, name)(x, y, **arguments, **{argument: value})
    with pytest.raises(ValueError, match=r"^softjax\.regression\.fit: `tol` "):
        regression.fit(x, y, tol=-1.0)
    for switch in SWITCHES:
        for name, argument in (
            ("fit", "l1"),
            ("fit", "tol"),
            ("fit_path", "l1"),
            ("fit_many", "l2"),
        ):
            said = rf"^softjax\.regression\.{name}: `{argument}` must be .*number"
            with pytest.raises(TypeError, match=said):
                getattr(regression, name)(x, y, **{argument: switch})
    params = regression.init(*np.shape(x)[1:], 2)
    for switches in ([True, False], np.array([True, False]), jnp.array([False, True]), True):
        for name, argument in (("fit_path", "l2"), ("fit_path", "l1"), ("fit_many", "l2")):
            said = rf"^softjax\.regression\.{name}: `{argument}` must be .*number"
            with pytest.raises(TypeError, match=said):
                getattr(regression, name)(x, y, **{argument: switches})
        for name in ("objective", "gradient", "hessian", "inference.covariance"):
            said = rf"^softjax\.regression\.{name}: `l2` must be .*number"
            with pytest.raises(TypeError, match=said):
                operator.attrgetter(name)(regression)(params, x, y, l2=switches)


def test_numbers_of_many_bits_are_taken_or_refused_by_name():
    """JAX counts steps in 32 bits and takes seeds of 64: errors of its own named neither."""
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6) % 2
    for steps in (2**31, 2**40, 2**70):
        assert regression.fit(x, y, l2=1.0, max_steps=steps, callback=lambda event: None).converged
    seeded = {
        "fit": {"optimizer": optax.sgd(0.1), "batch_size": 2, "epochs": 1},
        "train": {"optimizer": optax.sgd(0.1), "batch_size": 2, "epochs": 1},
        "bootstrap": {"resamples": 2, "l2": 1.0},
        "cross_validate": {"l2": [1.0], "folds": 2},
    }
    for name, options in seeded.items():
        said = rf"^softjax\.regression\.{name}: `seed` must be an integer of 64 bits, got "
        with pytest.raises(ValueError, match=said):
            getattr(regression, name)(x, y, **options, seed=2**64)


FUNCTIONS_OF_PARAMS = [
    function
    for module in (regression, regression.inference)
    for function in map(vars(module).get, module.__all__)
    if inspect.isfunction(function) and "params" in inspect.signature(function).parameters
]


@pytest.mark.parametrize("function", FUNCTIONS_OF_PARAMS)
def test_the_result_of_a_fit_is_not_its_parameters(function):
    result = regression.fit(np.arange(4.0)[:, None], np.array([0, 1, 0, 1]), max_steps=0)
    v = np.eye(4)
    given = {"features": np.ones((4, 1)), "labels": Y % 2, "covariance": v, "columns": [0]}
    given |= {"tangent": result.params, "restrictions": v, "reference": 0}
    needed = {
        name: given[name]
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "params" and parameter.default is parameter.empty
    }
    expected = "`params` must be a SoftmaxRegression, got "
    with pytest.raises(TypeError, match=f"{expected}FitResult; pass its `params`"):
        function(result, **needed)
    with pytest.raises(TypeError, match=f"{expected}ndarray"):
        function(v, **needed)


def test_truth_values_are_the_classes_0_and_1():
    x, y = np.arange(6.0)[:, None], np.array([0, 1, 0, 1, 0, 1])
    expected = regression.fit(x, y, l2=0.1).params
    for truth in (y == 1, jnp.asarray(y == 1), (y == 1).tolist()):
        kernel = regression.fit(x, truth, l2=0.1).params.kernel
        np.testing.assert_array_equal(kernel, expected.kernel)
    for function in (regression.objective, regression.gradient):
        of_truth, of_indices = (function(expected, x, labels) for labels in (y == 1, y))
        jax.tree.map(np.testing.assert_array_equal, of_truth, of_indices)
    rows = softjax.streaming.ArrayRows(x, y == 1)
    streamed = softjax.streaming.fit(rows, num_classes=2, l2=0.1)
    np.testing.assert_allclose(streamed.params.kernel, expected.kernel, rtol=1e-3)


@pytest.mark.filterwarnings("error")
def test_probabilities_may_be_lists():
    p, y = [[0.75, 0.25], [0.25, 0.75]], [0, 0]
    assert calibration.expected_calibration_error(p, y) == 0.25


def test_labels_in_a_list_may_be_traced():
    loss = jax.jit(lambda y: softjax.cross_entropy(X[:2], [y, 1]))
    np.testing.assert_allclose(loss(1), np.log(3) * np.ones(2), rtol=1e-6)
    assert np.isnan(loss(3)[0])
