"""Models written as pipeline layers: a pre-LayerNorm decoder, and ResNets."""
