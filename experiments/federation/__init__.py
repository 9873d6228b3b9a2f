"""Parts of `experiments.federate`."""
