"""Benchmarks: `visparse bench kernels`, `compile` and `step`. Nothing here is imported by the library itself."""
