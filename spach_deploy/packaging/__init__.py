"""A bundle becomes something that serves: one package per way to serve it.

Each writes a directory that needs neither the bundle nor spach-deploy any more.
"""
