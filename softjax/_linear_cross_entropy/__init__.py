"""The fused linear cross-entropy: the loss of hidden @ kernel, without all logits at once.

entry.py documents linear_cross_entropy and its plain form, checks what comes and reduces the
losses. blocks.py has the mathematics: the losses of some rows and classes, and their tangents.
pieces.py cuts arguments, sizes the pieces and sums over them; chunked.py has the two derivative
rules, of sums and of single losses, and sharded.py the same on the devices of a mesh, and where
on it all is. outputs.py and curvature.py are more functions of the same logits;
distillation.py compares two heads, by the divergences of divergences.py.
"""
