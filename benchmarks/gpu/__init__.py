"""Parts of `benchmarks.runtime_gpu`."""
