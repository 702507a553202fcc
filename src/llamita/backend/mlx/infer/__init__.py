"""Its inference."""
