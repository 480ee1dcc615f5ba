"""Engines: build plans with TensorRT or TensorRT for RTX, and read facts of the network and of the built plan."""
