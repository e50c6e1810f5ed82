"""Statistics of activations, measured block by block."""
