"""How much each key block matters to each query block, and which blocks to keep by it."""
