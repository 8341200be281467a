"""The static description of a call of a linear head, for which a program is compiled."""

from dataclasses import dataclass
from typing import Any

import jax

from softjax import _checks
from softjax._linear_cross_entropy.blocks import Classes
from softjax._linear_cross_entropy.layout import Layout, layout_of
from softjax._sharding import Lead, Names, mesh_of


@dataclass(frozen=True)
class Call:
    """The placement of examples and classes, and the options of the computation."""

    lead: Lead  # the leading axes of the examples
    layout: Layout | None  # the mesh axes of the arguments; None if there is only one device
    reduction: str = "none"  # the reduction of the losses
    # The number of bytes for temporaries; None for the default of the platform.
    budget: int | None = None
    # The number of examples for which there is room; None for all of them.
    max_active: int | None = None
    # Whether the bits of an example's results do not depend on the batch.
    batch_invariant: bool = False


def call_of(
    function: str,
    classes: Classes,
    of_examples: Any,
    others: Any,
    class_axis: str | Names | None,
    feature_axis: str | Names | None,
    *,
    batch_invariant: bool = False,
    **options: Any,
) -> Call:
    """The call of `function` with these arrays and options, some of which are checked here.

    Args:
        function: the name of the public function, for errors.
        classes: the kernel and bias of the head.
        of_examples: a tree of the arrays of the examples, of which hidden [..., D] is the first.
        others: a tree of all other arrays that may be on a mesh.
        class_axis: as in linear_cross_entropy.
        feature_axis: as in linear_cross_entropy.
        batch_invariant: as in linear_cross_entropy.
        **options: the other attributes of the call.
    """
    arrays = jax.tree.leaves(of_examples)
    mesh, ndim = mesh_of((classes, arrays, others)), arrays[0].ndim - 1
    lead = Lead.of(mesh, ndim, classes.kernel, classes.axis, *arrays)
    layout = layout_of(function, lead, classes, class_axis, feature_axis)
    invariant = _checks.flag(function, "batch_invariant", batch_invariant)
    call = Call(lead, layout, batch_invariant=invariant, **options)
    over, refused = layout.classes if layout is not None else (), None
    if over:
        refused = f"where the classes are over the axes {over}"
    elif call.reduction != "none":
        refused = f'for the reduction "{call.reduction}"'
    if invariant and refused:
        raise ValueError(_checks.message(function, "batch_invariant", f"False {refused}", True))
    return call
