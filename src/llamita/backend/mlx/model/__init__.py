"""The model in MLX."""
