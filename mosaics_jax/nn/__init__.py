"""The model: associative memories, the blocks made of them, and the transformer baselines from the same parts."""
