"""Proxy tokens: one key and one value that stand for all the tokens of a tile."""
