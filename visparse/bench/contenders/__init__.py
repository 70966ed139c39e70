"""Contenders of the kernel benchmark: visparse and every peer that may be installed, one file each."""
