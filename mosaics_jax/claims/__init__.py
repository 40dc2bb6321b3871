"""The paper's claims at sizes that run anywhere: variants of the model trained alike, and asked what the paper asks."""
