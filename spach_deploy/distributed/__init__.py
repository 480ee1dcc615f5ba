"""Work on many machines with Ray (https://docs.ray.io), the only package here that knows of it."""
