"""One file a verb or group of verbs."""
