"""Work on many machines with Ray (https://docs.ray.io). No other package imports it."""
