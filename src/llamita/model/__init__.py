"""What a model is: its shape, its parameters, what they cost. No files, no framework."""
