"""Several pictures or clips of one prompt, what people think of them, and the pairs that a model learns their taste from."""
