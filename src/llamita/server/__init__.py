"""The server: one model behind the HTTP APIs that clients speak, and a page to talk to it."""
