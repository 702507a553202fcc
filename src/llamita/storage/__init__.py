"""Bytes on disk: model directories, adapters, other people's formats."""
