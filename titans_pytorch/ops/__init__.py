"""Operations, one folder each: a public function, its reference in plain PyTorch, and its Triton kernels."""
