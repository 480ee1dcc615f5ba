"""Kubernetes: a container image with Triton and the model, and the manifests that run it, plainly or by KServe.

options.py       what was asked for
versions.py      the image that fits a bundle, or why none does
names.py         names that Kubernetes, Triton and registries take
deployed.py      a bundle with its image, names and sizes; sizes.py how long a start may take, how much memory it needs
golden_pack.py   golden data for golden_check.py, the script in the image that checks the model before traffic
templates/       Dockerfile, manifests and README, as they are written; templating.py and words.py fill them in
folder.py        the whole folder, written in one step
"""
