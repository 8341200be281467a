"""The fused linear cross-entropy: the loss of hidden @ kernel, without all logits at once.

A piece is a set of rows or of classes. A block is a piece of rows by a piece of classes, with its
logits.

entry.py documents linear_cross_entropy and its plain form. heads.py checks the arguments, layout.py
describes a call and its placement on a mesh, and examples.py finds the active examples, packs them
and reduces their losses. blocks.py has the mathematics: the losses of a block and their tangents;
tops.py finds the largest logits and the sums relative to them. plans.py determines the sizes of the
pieces on each platform, and pieces.py cuts arguments into pieces and sums over them. gradients.py
has the derivative rule of the losses of single rows, also for a fixed number of rows at a time, and
sums.py the rule of sums.

shards.py merges the statistics of sharded classes, sharded.py computes the losses on a mesh, and
unused_meshes.py reports a mesh that cannot be used.

outputs.py and curvature.py have further functions of the same logits. readings.py reads entropy and
top classes from a block, and row_outputs.py from all classes, also together with the gradients of a
loss. distillation.py compares two heads: pairs.py loops over their rows, comparison.py has the
losses of some rows and their tangents, and divergences.py the terms.
"""
