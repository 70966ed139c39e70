"""visparse: sparse attention for visual generation."""
