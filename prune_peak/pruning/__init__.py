"""What is decided: how much is pruned, which neurons stay, and the refit."""
