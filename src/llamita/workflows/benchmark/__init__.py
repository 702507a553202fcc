"""Measuring an OpenAI-compatible server under load: prompts, client, loads, statistics, and the files of a result."""
