"""NVIDIA Triton Inference Server: a model repository from bundles, and an offline check of any repository.

options.py       the options, as frozen objects
served_model.py  from bundles to the models that the repository serves, each with its backend
config.py        config.pbtxt of a model, with its tensors and warm-up requests
ensemble.py      the steps around a model, and the ensemble that connects them
repository.py    the whole directory, written in one step
steps/           the Python-backend steps of an ensemble, copied unchanged into the repository
schema.py        Triton's own protobuf messages
check/           the offline check
"""
