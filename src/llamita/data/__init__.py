"""Documents, shards, rows and batches."""
