"""Requests, detokenizing and the engine; knows no framework."""
