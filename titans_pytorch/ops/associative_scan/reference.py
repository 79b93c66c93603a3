"""The associative scan of the `assoc-scan` package, in plain PyTorch."""

from assoc_scan import AssocScan

__all__ = ['AssocScan']
