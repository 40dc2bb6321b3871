"""The jobs for a lent GPU: `python -m launch.gpu` is the suite; docs/results/gpu/README.md says what there is."""
