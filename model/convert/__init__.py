"""To and from Hugging Face's architectures: configurations and weights, as tables."""
