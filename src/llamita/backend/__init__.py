"""The backends: their contract, all that both share, and the two that there are."""
