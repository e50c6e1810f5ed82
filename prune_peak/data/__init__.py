"""What a model reads: text, images, and text that it generates itself."""
