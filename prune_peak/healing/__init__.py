"""Learn back from the original what pruning lost: data, training, and the healed folder."""
