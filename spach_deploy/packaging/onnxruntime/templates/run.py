"""Runs this folder's golden images with the best execution provider that ONNX Runtime has here, and compares.

    python run.py [PROVIDER]     such as CPUExecutionProvider; without it, the first of model.txt that runs

Exit codes: 0 the answers are PyTorch's, 1 they are not, 2 bad usage or a damaged folder, 3 no provider here runs it.
"""

import sys

try:
    import onnxruntime as ort
    from golden import HERE, compared, read_folder
except ImportError as missing:
    print(f"Error: {missing}. pip install numpy onnxruntime", file=sys.stderr)
    sys.exit(3)

CPU, CUDA, RTX = "CPUExecutionProvider", "CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider"


def session_of(file, provider):
    """A session in which `provider` runs the file. Raises RuntimeError or ONNX Runtime's own errors where it cannot."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what is raised need not be printed too
    if provider == RTX and provider not in ort.get_available_providers():
        import onnxruntime_ep_nv_tensorrt_rtx as plugin  # NVIDIA's provider is a library outside of ONNX Runtime

        ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
        options.add_provider_for_devices([device for device in ort.get_ep_devices() if device.ep_name == RTX][:1], {})
        return ort.InferenceSession(HERE / file, options)
    if provider not in ort.get_available_providers():
        raise RuntimeError("this ONNX Runtime does not have it")
    settings = {"use_tf32": 0} if provider == CUDA else {}  # the bounds of an FP32 model are for FP32 products
    session = ort.InferenceSession(
        HERE / file,
        options,
        providers=[(provider, settings), *({CPU} - {provider})],
        disabled_optimizers=["MatmulTransposeFusion"],  # ends the process for some graphs in ONNX Runtime 1.32
    )
    if session.get_providers()[0] != provider:  # ONNX Runtime would fall back to the CPU
        raise RuntimeError("it does not load, for want of its libraries or the driver")
    return session


def main(words):
    """Run with the first provider of model.txt that can, or with the one that is named."""
    if len(words) > 1 or "".join(words).startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if words == ["--help"] else 2
    try:
        lines, golden = read_folder()
        runs = [run for run in lines["run"] if run[1:2] == words or not words]
    except (OSError, ValueError, LookupError) as error:
        print(f"Error: {HERE} is damaged ({error}). Write it again: spach-package onnxruntime", file=sys.stderr)
        return 2
    for file, provider, *needs in runs or [("model.onnx", *words)]:
        try:
            session = session_of(file, provider)
        except Exception as error:  # ONNX Runtime's own have no common base
            needs = f" It needs {' '.join(needs)}." if needs else ""
            print(f"{provider} does not run {file} here: {str(error).splitlines()[0]}.{needs}", file=sys.stderr)
            continue
        print(f"{provider} runs {file}")
        try:
            return compared(session, lines, golden, file)
        except Exception as error:
            print(f"Error: {file} failed while it ran: {str(error).splitlines()[0]}.", file=sys.stderr)
            return 1
    print("Error: no execution provider here runs this model.", file=sys.stderr)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
