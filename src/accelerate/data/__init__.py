"""Which samples each rank reads: samplers, prepared loaders, the dispatcher."""
