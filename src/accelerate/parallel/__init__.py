"""How a model is spread over processes: strategies, and the steps of `prepare`."""
