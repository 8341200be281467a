"""The fused linear cross-entropy: the loss of hidden @ kernel, without the logits."""
