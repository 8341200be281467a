"""What is known of a call of a linear head before any number is: a program is compiled for it."""

from dataclasses import dataclass
from typing import Any

import jax

from softjax import _checks
from softjax._linear_cross_entropy.blocks import Classes
from softjax._linear_cross_entropy.layout import Layout, layout_of
from softjax._sharding import Lead, Names, mesh_of


@dataclass(frozen=True)
class Call:
    """Where the examples and the classes are, and how the losses are computed and reduced.

    Attributes:
        lead: the leading axes of the examples.
        layout: the axes of a mesh; None where there is nothing to share.
        reduction: of the losses.
        budget: the number of bytes for temporaries; None for that of the platform.
        max_active: how many examples there is room for; None where there is room for all.
        batch_invariant: whether the results of an example depend on no other.
    """

    lead: Lead
    layout: Layout | None
    reduction: str = "none"
    budget: int | None = None
    max_active: int | None = None
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
    """The call of `function` with these arrays, once its other options are checked.

    Args:
        function: the one that is called, for errors.
        classes: of the head.
        of_examples: a tree of arrays of the examples, of which hidden [..., D] is the first.
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
