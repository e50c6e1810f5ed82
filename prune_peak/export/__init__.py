"""What is written: the folder, recipe, card, and other formats."""
