"""The transformers class that is written."""
