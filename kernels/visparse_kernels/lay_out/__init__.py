"""Laying out: tokens copied into the order of their blocks, and means of blocks made on the way."""
