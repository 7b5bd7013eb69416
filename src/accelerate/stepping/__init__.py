"""What happens between two batches: optimizers, schedulers, clipping."""
