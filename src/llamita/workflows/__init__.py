"""Whole tasks that need several rooms."""
