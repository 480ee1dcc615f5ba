"""Kubernetes: a container image with Triton and the model, and manifests that run it, with or without KServe.

options.py           the options, and checks of names for Kubernetes, Triton and registries
deployment.py        what is deployed: a bundle, the Triton image that fits it, start-up time and memory
golden_pack.py       golden data for golden_check.py, the script in the image that checks the model before traffic
template_context.py  the values of the templates' placeholders
templates/           Dockerfile, manifests and README with placeholders
folder.py            the whole folder, written in one step
"""
