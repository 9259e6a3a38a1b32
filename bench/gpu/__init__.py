"""What a machine with a GPU is asked, all of it by bench/gpu.sh, and what the kernels should take there."""
