"""spach-package: turning a bundle into files that serve it, one subpackage for each way of serving.

Each writes a directory that needs neither the bundle nor spach-deploy afterwards.
"""
