"""Engines: TensorRT in two flavours behind one interface, and what can be said of a built plan."""
