"""Language models: loading, names of hooks, access to the Hub, forward passes."""
