"""The inference engine, its scheduler and memory, and the LLM over them; knows no framework."""
