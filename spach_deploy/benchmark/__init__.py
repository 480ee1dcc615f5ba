"""How fast a bundle's model is on this machine, in everything here that can run it, and how right."""
