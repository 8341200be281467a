"""The fused linear cross-entropy: the loss of hidden @ kernel, without all logits at once.

entry.py documents and checks; chunked.py has the two derivative rules; gradients.py and tangents.py
what they compute, of blocks.py; sweep.py goes over pieces, of the sizes that plan.py gives.
sharded.py does it on the devices of a mesh, where layout.py says that rows and classes are.
reference.py is the plain form.
"""
