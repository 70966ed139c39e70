"""Block-sparse attention: one operator, three implementations."""
