"""Runs this folder's golden images with the best execution provider that ONNX Runtime has here, and compares.

    python run.py [PROVIDER]     such as CPUExecutionProvider; without it, the first of model.txt that runs

Exit codes: 0 the answers are PyTorch's, 1 they are not, 2 bad usage or a damaged folder, 3 no provider here runs it.
"""

import hashlib
import math
import pathlib
import sys

try:
    import numpy as np
    import onnxruntime as ort
except ImportError as missing:
    print(f"Error: {missing}. pip install numpy onnxruntime", file=sys.stderr)
    sys.exit(3)

HERE = pathlib.Path(__file__).resolve().parent
CPU, CUDA, RTX = "CPUExecutionProvider", "CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider"
NEEDS = {
    RTX: "pip install onnxruntime-ep-nv-tensorrt-rtx, in the version that README.md names; an RTX GPU and its driver",
    "TensorrtExecutionProvider": "pip install onnxruntime-gpu, the TensorRT that README.md names, and the plan's GPU",
    CUDA: "pip install onnxruntime-gpu; an NVIDIA GPU and its driver",
}


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


def read_folder():
    """Lines of model.txt by their first word, golden arrays (N, ...) by name, bounds by file, and labels if any."""
    lines = {}
    for word, *rest in map(str.split, (HERE / "model.txt").read_text(encoding="utf-8").splitlines()):
        lines.setdefault(word, []).append(rest)
    arrays = {}
    for name, _, _, stored, *shape in (*lines["input"], *lines["output"]):
        arrays[name] = np.fromfile(HERE / f"golden.{name}.bin", stored).reshape(-1, *map(int, shape))
    bounds = {(file, name): [float(figure) for figure in figures] for file, name, *figures in lines["bound"]}
    if not all(len(figures) == 3 and min(figures) >= 0 and sum(figures) >= 0 for figures in bounds.values()):
        raise ValueError("model.txt has a bound that is none")  # a sum with NaN is NaN
    if int(lines["batch"][0][0]) < 1:
        raise ValueError("model.txt has a batch below 1")
    sizes = {len(array) for array in arrays.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError("its golden files do not fit")
    for file, size, digest in lines["file"]:
        if (HERE / file).stat().st_size != int(size) or sha256_of(HERE / file) != digest:
            raise ValueError(f"{file} was changed since it was written")
    for file, _ in lines["run"]:
        bounds[file] = {name: bounds[file, name] for name, *_ in lines["output"]}
    return lines, arrays, bounds, read_labels(lines, arrays)


def sha256_of(file):
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def read_labels(lines, arrays):
    """Names of the classes from labels.txt; none where there is no such file."""
    if not (HERE / "labels.txt").exists():
        return []
    labels = (HERE / "labels.txt").read_text(encoding="utf-8").splitlines()
    if any(arrays[name].shape[1] != len(labels) for name, role, *_ in lines["output"] if role == "logits"):
        raise ValueError(f"labels.txt names {len(labels)} classes, and the model has another number")
    return labels


def faults(found, expected, role, bound, scores):
    """Yield what is wrong with an output (N, ...). `bound`: relative L2, largest error, what is a tie in `scores`."""
    is_ranking = role == "top_indices"
    if found.shape != expected.shape or (is_ranking and not 0 <= found.min() <= found.max() < scores.shape[1]):
        yield f"{found.dtype} {found.shape} is no answer like {expected.shape}"
        return
    if is_ranking or role == "logits":
        chosen, best = (a.argmax(1)[:, None] if role == "logits" else a for a in (found, expected))
        gap = np.abs(np.take_along_axis(scores, best, 1) - np.take_along_axis(scores, chosen, 1)).max()
        if is_ranking:
            print(f"    between classes that differ {gap:.2e}{allowed(bound[2])}")
        if not gap <= bound[2]:
            yield f"classes differ that PyTorch scores {gap:.2e} apart, and {bound[2]:.2e} is a tie"
    if not is_ranking:
        found, expected = (a.reshape(len(a), -1).astype(np.float64) for a in (found, expected))
        size = np.maximum(np.square(expected).sum(1), 1e-300)
        size = np.maximum(size, size.mean()) if expected.shape[1] < 8 else size  # few numbers may be zero by chance
        figures = np.sqrt((np.square(found - expected).sum(1) / size).max()), np.abs(found - expected).max()
        for what, figure, most in zip(("relative L2", "largest error"), figures, bound[:2], strict=True):
            print(f"    {what} {figure:.2e}{allowed(most)}")
            if not figure <= most:
                yield f"its {what} is {figure:.2e}, and {most:.2e} is allowed"


def allowed(most):
    """The words on a bound, where there is one."""
    return f", allowed {most:.2e}" if math.isfinite(most) else ""


def compared(session, lines, golden, bounds, labels):
    """Run the golden images, in batches that a plan takes too, and compare. Returns the exit code."""
    entry, size, wrong = lines["input"][0][0], int(lines["batch"][0][0]), 0
    images, names = golden[entry], [name for name, *_ in lines["output"]]
    batches = [images[np.arange(start, start + size) % len(images)] for start in range(0, len(images), size)]
    runs = [session.run(names, {entry: batch}) for batch in batches]
    scores = next((golden[name].astype(np.float64) for name, role, *_ in lines["output"] if role == "logits"), None)
    for (name, role, *_), parts in zip(lines["output"], zip(*runs, strict=True), strict=True):
        found = np.concatenate(parts)[: len(images)]
        print(f"  {name} {found.dtype} {list(found.shape)}")
        for fault in faults(found, golden[name], role, bounds[name], scores):
            print(f"Error: {name}: {fault}.", file=sys.stderr)
            wrong = 1
        if role == "logits" and labels:
            print("    " + ", ".join(labels[best] for best in found.argmax(1)))
    print(f"{len(images)} images: {'not ' if wrong else ''}what PyTorch answers in FP32")
    return wrong


def reason(error):
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def main(arguments):
    """Run with the first provider of model.txt that can, or with the one that is named."""
    if len(arguments) > 1 or "".join(arguments).startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        lines, golden, bounds, labels = read_folder()
        runs = [run for run in lines["run"] if not arguments or run[1] == arguments[0]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"Error: {HERE} is damaged ({error}). Write it again: spach-package onnxruntime", file=sys.stderr)
        return 2
    for file, provider in runs or [("model.onnx", *arguments)]:
        try:
            session = session_of(file, provider)
        except Exception as error:  # ONNX Runtime's own have no common base
            needs = f"It needs: {NEEDS[provider]}." if provider in NEEDS else ""
            print(f"{provider} does not run {file} here: {reason(error)}. {needs}".strip(), file=sys.stderr)
            continue
        print(f"{provider} runs {file}")
        try:
            return compared(session, lines, golden, bounds[file], labels)
        except Exception as error:
            print(f"Error: {file} failed while it ran: {reason(error)}.", file=sys.stderr)
            return 1
    print("Error: no execution provider here runs this model.", file=sys.stderr)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
