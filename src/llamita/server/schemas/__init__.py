"""The bodies of requests and answers, as pydantic models: strict types, no unknown fields."""
