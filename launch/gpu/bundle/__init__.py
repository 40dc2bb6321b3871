"""What travels to a GPU machine: `read` uses it there, `python -m launch.gpu.bundle` makes it here."""
