"""Models: supported families, config checks, weight names, and block-by-block execution."""
