"""One mesh, and how a model is laid over it."""
