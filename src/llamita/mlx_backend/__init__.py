"""What Llamita does with MLX."""
