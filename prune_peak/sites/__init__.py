"""What can be pruned, and what pruning it means."""
