"""The golden images of this folder, PyTorch's answers to them, and the comparison that run.py makes."""

import hashlib
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent


def read_folder():
    """Lines of model.txt by their first word, and golden arrays (N, ...) by name. Raises where files were changed."""
    lines = {}
    for word, *rest in map(str.split, (HERE / "model.txt").read_text(encoding="utf-8").splitlines()):
        lines.setdefault(word, []).append(rest)
    for file, _, digest in lines["file"]:
        if hashlib.sha256((HERE / file).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{file} was changed since it was written")
    bounds = {(file, name): [float(figure) for figure in figures] for file, name, *figures in lines["bound"]}
    lines["bound"] = {file: {name: bounds[file, name] for name, *_ in lines["output"]} for file, *_ in lines["run"]}
    if int(lines["batch"][0][0]) < 1:
        raise ValueError("model.txt has a batch below 1")
    golden = {}
    for name, _, _, stored, *shape in (*lines["input"], *lines["output"]):
        golden[name] = np.fromfile(HERE / f"golden.{name}.bin", stored).reshape(-1, *map(int, shape))
    return lines, golden


def agrees(found, expected, role, scores, bounds):
    """Whether an output (N, ...) is within `bounds`: relative L2, largest error, and how far `scores` may be apart of
    classes that are chosen in place of PyTorch's.
    """
    values, wanted = (array.reshape(len(array), -1).astype(np.float64) for array in (found, expected))
    if values.shape != wanted.shape:
        print(f"    {found.shape} is no answer like {expected.shape}")
        return False
    size = np.square(wanted).sum(1)
    size = np.maximum(size, max(size.mean() if wanted.shape[1] < 8 else 0, 1e-300))  # few may be zero by chance
    figures = [np.sqrt((np.square(values - wanted).sum(1) / size).max()), np.abs(values - wanted).max(), 0.0]
    if role in ("logits", "top_indices"):
        ours, theirs = (a if role == "top_indices" else a.argmax(1)[:, None] for a in (found, expected))
        figures[2] = np.abs(np.take_along_axis(scores, ours, 1) - np.take_along_axis(scores, theirs, 1)).max()
    names = "relative L2", "largest error", "between classes that differ"
    for what, figure, most in zip(names, figures, bounds, strict=True):
        if most < np.inf:
            print(f"    {what} {figure:.2e}, allowed {most:.2e}")
    return all(figure <= most for figure, most in zip(figures, bounds, strict=True))


def compared(session, lines, golden, file):
    """Run the golden images, in batches that a plan takes too, and compare. Returns the exit code."""
    entry, size = lines["input"][0][0], int(lines["batch"][0][0])
    images, names = golden[entry], [name for name, *_ in lines["output"]]
    batches = [images[np.arange(start, start + size) % len(images)] for start in range(0, len(images), size)]
    runs = [session.run(names, {entry: batch}) for batch in batches]
    scores = next((golden[name] for name, role, *_ in lines["output"] if role == "logits"), None)
    agreed = []
    for (name, role, *_), parts in zip(lines["output"], zip(*runs, strict=True), strict=True):
        found = np.concatenate(parts)[: len(images)]
        print(f"  {name} {found.dtype} {list(found.shape)}")
        agreed.append(agrees(found, golden[name], role, scores, lines["bound"][file][name]))
        if role == "logits" and any(entry[0] == "labels.txt" for entry in lines["file"]):
            labels = (HERE / "labels.txt").read_text(encoding="utf-8").splitlines()
            print("    " + ", ".join(labels[best] for best in found.argmax(1)))
    print(f"{len(images)} images: {'' if all(agreed) else 'not '}what PyTorch answers in FP32")
    return 0 if all(agreed) else 1
