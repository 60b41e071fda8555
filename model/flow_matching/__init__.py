"""Flow matching on tokens: a bidirectional transformer that refines noise into text."""
