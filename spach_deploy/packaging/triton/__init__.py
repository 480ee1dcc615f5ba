"""NVIDIA Triton Inference Server: a model repository from bundles, and an offline check of any repository.

options.py       the options, as frozen objects
served_model.py  from bundles to the models that the repository serves, each with its backend
config.py        config.pbtxt of a model, with its tensors and warm-up requests, in Triton's protobuf messages
serving.py       what serves them: the images that load them, the server's flags, its shared memory
readme.py        README.md of a repository
repository.py    the whole directory with its ensembles, written in one step
steps/           the Python-backend steps of an ensemble, copied unchanged into the repository
check/           the offline check
"""
