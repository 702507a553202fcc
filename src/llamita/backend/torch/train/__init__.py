"""Its training step."""
