"""Llamita: train, adapt, check and serve small Llama-family language models."""

__version__ = "0.1.0"
