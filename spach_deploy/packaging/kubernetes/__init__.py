"""Kubernetes: a container image with Triton and the model, and manifests or a Helm chart that run it, or KServe does.

deployment.py        what is deployed: options, a bundle, the Triton image that fits it, names, start-up time, memory
golden_check.py      the script in the image that checks the model before traffic
template_context.py  the values of the templates' placeholders, and golden data for golden_check.py
templates/           Dockerfile, manifests, chart and README with placeholders
folder.py            the whole folder, written in one step
"""
