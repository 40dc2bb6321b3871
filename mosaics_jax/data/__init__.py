"""The road from text to batches: `prepare` writes token shards once, `pipeline` reads them ever after. No jax here."""
