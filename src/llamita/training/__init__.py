"""The training loop; knows no framework."""
