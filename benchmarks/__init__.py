"""Benchmarks of fastnas against plain PyTorch; ``make bench`` runs them."""
