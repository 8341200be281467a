"""The fused linear cross-entropy: the loss of hidden @ kernel, without all logits at once.

entry.py documents linear_cross_entropy and its plain form and reduces the losses; heads.py checks
what comes. A piece is some rows, or some classes; a block is what one of each has in common, such
as their logits. blocks.py has the mathematics: the losses of a block and their tangents, from the
largest logits and the others relative to these, which tops.py finds. plans.py says how large the
pieces are on each platform, and pieces.py cuts arguments into them and sums over them. gradients.py
has the derivative rule of single losses and sums.py that of sums. examples.py says what each
example counts, and puts those together that take part; invariant.py takes as many at a time
whatever the batch. layout.py says where all is on a mesh, shards.py joins what devices with
different classes know of a row, and sharded.py has the losses there; unseen.py warns where the mesh
is not known, and batched.py refuses a batch on an axis that is not free.

outputs.py and curvature.py are more functions of the same logits: readings.py is what they say of
some classes, and beside.py of all, beside the gradients of a loss too. distillation.py compares two
heads: pairs.py goes over their rows, comparison.py has the losses of some rows and their tangents,
and divergences.py the terms.
"""
