"""The parts of the GPU suite; each runs in a process of its own (`python -m launch.gpu.parts NAME ...`)."""
