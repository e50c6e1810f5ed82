"""Quality, latency and benchmark tasks of models, side by side."""
