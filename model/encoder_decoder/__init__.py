"""From one sequence to another: an encoder, and a decoder that looks at what it makes."""
