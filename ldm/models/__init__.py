"""Networks: weights and forward passes, nothing else."""
