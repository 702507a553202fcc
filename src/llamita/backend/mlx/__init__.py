"""The model, its training step and its inference in MLX."""
