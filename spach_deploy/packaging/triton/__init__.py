"""NVIDIA Triton Inference Server: a model repository from bundles, and an offline check of any repository.

options.py      what was asked for
served.py       bundles -> the models that the repository serves, and with which backend
config.py       a model -> its config.pbtxt; warmup.py its warm-up requests; ensemble.py the steps around it
repository.py   the whole directory, written in one step
steps/          the Python-backend steps of an ensemble, copied into the repository as they are
schema.py       Triton's own message definitions
check/          the linter
"""
