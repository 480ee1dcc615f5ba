"""A model repository from bundles: what is in it, which backend serves it, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.schema import Form, Manifest
from spach_deploy.bundle.store import GRAPH, PLAN, Bundle
from spach_deploy.common.errors import BundleError, SpachError, UsageError
from spach_deploy.common.machine import VNNI_ONLY
from spach_deploy.options.specs import BatchProfile, IODtype, OutputSpec, Precision, Preprocessing, channel_statistics
from spach_deploy.packaging.polygraphy.folder import write_folder
from spach_deploy.packaging.triton.check import check_repository
from spach_deploy.packaging.triton.config import data_type_name, parse
from spach_deploy.packaging.triton.options import (
    Accelerator,
    Backend,
    Batching,
    Device,
    Ensemble,
    EnsembleInput,
    Instances,
    RateLimiter,
    TritonOptions,
    VersionPolicy,
)
from spach_deploy.packaging.triton.repository import (
    TritonRepository,
    repository_json,
    repository_text,
    serve_command,
    write_repository,
)
from spach_deploy.packaging.triton.served_model import BundleArgument, resolve_models
from spach_deploy.pipeline import runtime_form
from tests import small_bundles
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny
from tests.quantization import small_quantized
from tests.small_bundles import read_manifest, write_manifest

FIVE = Preprocessing.for_size(8, *channel_statistics(5))

EVERY_OUTPUT = OutputSpec(top_k=3, softmax=True)

PADDED = Tiny(precision=Precision.BF16, bfloat16=("Pad",), engine="none")


def written(tmp_path: Path, tiny: Tiny | None = None, **options: Any) -> TritonRepository:
    bundle = tiny_bundles.write(tmp_path / "bundle", tiny)
    return write_repository([BundleArgument(bundle)], tmp_path / "repository", TritonOptions(**options))


def config(repository: Path, name: str = "tiny") -> Any:
    return parse((repository / name / "config.pbtxt").read_text())


def tensors(values: Any) -> dict[str, tuple[str, list[int]]]:
    return {value.name: (data_type_name(value.data_type), list(value.dims)) for value in values}


# What is in it


def test_a_plan_of_ordinary_tensorrt_is_served_as_it_is(tmp_path: Path) -> None:
    repository = written(tmp_path, Tiny(outputs=EVERY_OUTPUT)).path
    model = config(repository)
    assert (model.name, model.platform, model.backend) == ("tiny", "tensorrt_plan", "tensorrt")
    assert (repository / "tiny" / "1" / "model.plan").read_bytes() == (tmp_path / "bundle" / PLAN).read_bytes()
    assert model.max_batch_size == 8
    assert tensors(model.input) == {"input": ("TYPE_FP32", [3, 8, 8])}
    assert tensors(model.output) == {
        "logits": ("TYPE_FP32", [7]),
        "probabilities": ("TYPE_FP32", [7]),
        "top_values": ("TYPE_FP32", [3]),
        "top_indices": ("TYPE_INT64", [3]),
    }
    assert [group.kind for group in model.instance_group] == [1]  # KIND_GPU


def test_outputs_are_served_by_what_they_are(tmp_path: Path) -> None:
    repository = written(tmp_path / "vector", tiny_bundles.EMBEDDING).path
    (vector,) = config(repository).output
    assert (vector.name, vector.label_filename) == ("vector", "")
    assert not (repository / "tiny" / "labels.txt").exists()
    assert not check_repository(repository).findings
    renamed = {
        output.name: output.label_filename for output in config(written(tmp_path, tiny_bundles.RENAMED).path).output
    }
    assert renamed == {"scores": "labels.txt", "probabilities": "labels.txt", "top_values": "", "top_indices": ""}


@pytest.mark.parametrize("options", [{"ensemble": Ensemble()}, {"labels": Path("names.txt")}])
def test_classes_are_not_named_where_there_are_none(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"tiny (gives vector alone|has no logits)"):
        written(tmp_path, tiny_bundles.EMBEDDING, **options)


def test_an_ensemble_ranks_logits_of_another_name(tmp_path: Path) -> None:
    steps = config(written(tmp_path, tiny_bundles.RENAMED, ensemble=Ensemble()).path, "tiny_ensemble")
    model, ranking = steps.ensemble_scheduling.step[1:]
    assert dict(model.output_map) == {"scores": "logits"}
    assert dict(ranking.input_map) == {"logits": "logits"}


def test_batching_follows_the_engines_profile(tmp_path: Path) -> None:
    model = config(written(tmp_path, batching=Batching(queue_delay_us=77)).path)
    assert list(model.dynamic_batching.preferred_batch_size) == [4, 8]
    assert model.dynamic_batching.max_queue_delay_microseconds == 77


def test_dynamic_batching_can_be_left_out(tmp_path: Path) -> None:
    model = config(written(tmp_path, batching=Batching(dynamic=False)).path)
    assert not model.HasField("dynamic_batching")


@pytest.mark.parametrize(
    ("io_dtype", "data_type", "dims", "layout"),
    [
        (IODtype.FP32, "TYPE_FP32", [3, 8, 8], 2),
        (IODtype.FP16, "TYPE_FP16", [3, 8, 8], 2),
        (IODtype.UINT8, "TYPE_UINT8", [8, 8, 3], 1),
    ],
)
def test_every_interface_has_its_type_dims_and_format(
    tmp_path: Path, io_dtype: IODtype, data_type: str, dims: list[int], layout: int
) -> None:
    model = config(written(tmp_path, Tiny(outputs=OutputSpec(io_dtype))).path)
    assert tensors(model.input) == {"input": (data_type, dims)}
    assert model.input[0].format == layout


def test_warm_up_sends_a_golden_image_at_the_smallest_usual_and_largest_batch(tmp_path: Path) -> None:
    repository = written(tmp_path).path
    warm_up = config(repository).model_warmup
    assert [(item.name, item.batch_size) for item in warm_up] == [("golden_1", 1), ("golden_4", 4), ("golden_8", 8)]
    golden = Golden.load(tmp_path / "bundle" / "golden.npz")
    for item in warm_up:
        sample = item.inputs["input"]
        assert (data_type_name(sample.data_type), list(sample.dims)) == ("TYPE_FP32", [3, 8, 8])
        assert (repository / "tiny" / "warmup" / sample.input_data_file).read_bytes() == golden.input[0].tobytes()


def test_an_engine_that_takes_no_single_images_gets_whole_requests(tmp_path: Path) -> None:
    """Were the batch Triton's, it would send batches of one to an engine that starts at two."""
    repository = written(tmp_path, Tiny(batch=BatchProfile(2, 4, 6))).path
    model = config(repository)
    assert model.max_batch_size == 0
    assert not model.HasField("dynamic_batching")
    assert tensors(model.input) == {"input": ("TYPE_FP32", [-1, 3, 8, 8])}
    assert tensors(model.output) == {"logits": ("TYPE_FP32", [-1, 7])}
    sizes = [item.inputs["input"].dims[0] for item in model.model_warmup]
    assert sizes == [2, 4, 6]
    assert {item.batch_size for item in model.model_warmup} == {1}  # 0 would be no warm-up, 2 more than there is
    assert (repository / "tiny" / "warmup" / "golden_input_6").stat().st_size == 6 * 3 * 8 * 8 * 4


def test_an_engine_for_one_batch_names_it(tmp_path: Path) -> None:
    model = config(written(tmp_path, Tiny(batch=BatchProfile(4, 4, 4))).path)
    assert model.max_batch_size == 0
    assert tensors(model.input) == {"input": ("TYPE_FP32", [4, 3, 8, 8])}


def test_its_graph_takes_any_batch(tmp_path: Path) -> None:
    model = config(written(tmp_path, Tiny(batch=BatchProfile(4, 4, 4)), backend=Backend.ONNXRUNTIME).path)
    assert model.max_batch_size == 4


def test_options_reach_the_configuration(tmp_path: Path) -> None:
    policy = VersionPolicy.parse("latest:2")
    model = config(
        written(
            tmp_path,
            instances=Instances(3, gpus=(0, 2)),
            response_cache=True,
            version_policy=policy,
            warm_up=False,
        ).path
    )
    assert [(group.count, list(group.gpus), group.kind) for group in model.instance_group] == [(3, [0, 2], 1)]
    assert model.response_cache.enable
    assert model.version_policy.latest.num_versions == 2
    assert not model.model_warmup


def group(repository: Path, name: str) -> Any:
    (only,) = config(repository, name).instance_group
    return only


def test_pictures_are_decoded_by_several_instances_and_each_step_can_have_its_own_number(tmp_path: Path) -> None:
    usual = written(tmp_path / "usual", ensemble=Ensemble()).path
    counts = {name: group(usual, name).count for name in ("tiny_preprocess", "tiny", "tiny_top_k")}
    assert counts == {"tiny_preprocess": 4, "tiny": 1, "tiny_top_k": 1}
    instances = Instances.parse(["2", "tiny_preprocess:7", "tiny_top_k:3"])
    asked = written(tmp_path / "asked", ensemble=Ensemble(), instances=instances).path
    counts = {name: group(asked, name).count for name in counts}
    assert counts == {"tiny_preprocess": 7, "tiny": 2, "tiny_top_k": 3}
    assert {group(asked, name).kind for name in ("tiny_preprocess", "tiny_top_k")} == {2}  # KIND_CPU
    assert not config(asked, "tiny_ensemble").instance_group


def test_the_rate_limiter_is_told_what_models_and_steps_need(tmp_path: Path) -> None:
    limiter = RateLimiter.parse(["gpu=2", "tiny_preprocess:core=1:global", "tiny:gpu=3"], ["4", "tiny_top_k:2"])
    repository = written(tmp_path, Tiny(engine="none"), rate_limiter=limiter, ensemble=Ensemble())
    needs = {
        name: [(r.name, r.count, getattr(r, "global")) for r in group(repository.path, name).rate_limiter.resources]
        for name in ("tiny", "tiny_preprocess", "tiny_top_k")
    }
    assert needs == {"tiny": [("gpu", 3, False)], "tiny_preprocess": [("core", 1, True)], "tiny_top_k": []}
    assert group(repository.path, "tiny").rate_limiter.priority == 4
    assert group(repository.path, "tiny_top_k").rate_limiter.priority == 2
    assert "--rate-limit=execution_count" in str(serve_command(repository))
    assert not check_repository(repository.path).findings


def test_without_one_nothing_is_limited(tmp_path: Path) -> None:
    repository = written(tmp_path)
    assert not group(repository.path, "tiny").HasField("rate_limiter")
    assert "--rate-limit" not in str(serve_command(repository))


def test_without_options_cache_and_policy_are_left_to_triton(tmp_path: Path) -> None:
    model = config(written(tmp_path).path)
    assert not model.HasField("response_cache")
    assert not model.HasField("version_policy")


def test_labels_stand_beside_the_configuration_and_are_named_by_the_outputs(tmp_path: Path) -> None:
    names = [f"name {index}" for index in range(7)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    repository = written(tmp_path, Tiny(outputs=EVERY_OUTPUT), labels=tmp_path / "names.txt").path
    assert (repository / "tiny" / "labels.txt").read_text().splitlines() == names
    labelled = {tensor.name: tensor.label_filename for tensor in config(repository).output}
    assert labelled == {"logits": "labels.txt", "probabilities": "labels.txt", "top_values": "", "top_indices": ""}


def test_without_labels_classes_have_their_numbers(tmp_path: Path) -> None:
    assert (written(tmp_path).path / "tiny" / "labels.txt").read_text().splitlines()[6] == "class 6"


# Several bundles


def test_bundles_of_one_name_are_versions_with_what_all_of_them_accept(tmp_path: Path) -> None:
    first = tiny_bundles.write(tmp_path / "a", Tiny(batch=BatchProfile(1, 4, 8)))
    second = tiny_bundles.write(tmp_path / "b", Tiny(batch=BatchProfile(1, 16, 32)))
    bundles = [BundleArgument(first), BundleArgument(second)]
    result = write_repository(bundles, tmp_path / "repository", TritonOptions())
    assert sorted(path.name for path in (result.path / "tiny").iterdir() if path.is_dir()) == ["1", "2", "warmup"]
    model = config(result.path)
    assert model.max_batch_size == 8
    assert list(model.dynamic_batching.preferred_batch_size) == [8]


def test_names_make_them_models_of_their_own(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "a")
    arguments = [BundleArgument.parse(f"fast={bundle}"), BundleArgument.parse(str(bundle))]
    result = write_repository(arguments, tmp_path / "repository", TritonOptions())
    assert sorted(path.name for path in result.path.iterdir()) == ["README.md", "fast", "manifest.json", "tiny"]
    assert config(result.path, "fast").name == "fast"


def test_versions_that_differ_are_refused(tmp_path: Path) -> None:
    first = tiny_bundles.write(tmp_path / "a")
    second = tiny_bundles.write(tmp_path / "b", Tiny(outputs=EVERY_OUTPUT))
    with pytest.raises(UsageError, match=r"versions of tiny, differ in outputs\..*NAME=BUNDLE"):
        write_repository([BundleArgument(first), BundleArgument(second)], tmp_path / "repository", TritonOptions())


def test_versions_for_different_backends_are_refused(tmp_path: Path) -> None:
    first = tiny_bundles.write(tmp_path / "a")
    second = tiny_bundles.write(tmp_path / "b", Tiny(engine="none"))
    with pytest.raises(UsageError, match="different backends"):
        write_repository([BundleArgument(first), BundleArgument(second)], tmp_path / "repository", TritonOptions())


def test_versions_without_a_common_batch_are_refused(tmp_path: Path) -> None:
    first = tiny_bundles.write(tmp_path / "a", Tiny(batch=BatchProfile(1, 1, 2)))
    second = tiny_bundles.write(tmp_path / "b", Tiny(batch=BatchProfile(4, 4, 8)))
    with pytest.raises(UsageError, match="no batch in common"):
        write_repository([BundleArgument(first), BundleArgument(second)], tmp_path / "repository", TritonOptions())


# Plans of TensorRT for RTX


def test_a_plan_that_triton_cannot_load_is_left_out_and_the_graph_served(tmp_path: Path) -> None:
    result = written(tmp_path, Tiny(engine="tensorrt-rtx"))
    model = config(result.path)
    assert model.platform == "onnxruntime_onnx"
    assert (result.path / "tiny" / "1" / "model.onnx").read_bytes() == (tmp_path / "bundle" / GRAPH).read_bytes()
    assert not (result.path / "tiny" / "1" / "model.plan").exists()
    assert "does not load plans of TensorRT for RTX" in result.models[0].notes[0]
    assert result.warnings == ()


@pytest.mark.parametrize("options", [{"backend": Backend.TENSORRT}, {"force": True}])
def test_asked_for_it_is_written_with_a_warning(tmp_path: Path, options: dict[str, Any]) -> None:
    result = written(tmp_path, Tiny(engine="tensorrt-rtx"), **options)
    assert config(result.path).platform == "tensorrt_plan"
    assert "will not load" in result.warnings[0]


def test_a_bundle_without_a_plan_is_served_by_its_graph(tmp_path: Path) -> None:
    assert config(written(tmp_path, Tiny(engine="none")).path).platform == "onnxruntime_onnx"


def test_force_does_not_invent_a_plan(tmp_path: Path) -> None:
    assert config(written(tmp_path, Tiny(engine="none"), force=True).path).platform == "onnxruntime_onnx"


def test_a_plan_that_is_not_there_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no engine for --backend tensorrt: --engine none was asked for\."):
        written(tmp_path, Tiny(engine="none"), backend=Backend.TENSORRT)


def test_bfloat16_as_a_graph_is_for_gpus_and_says_from_which_triton_on(tmp_path: Path) -> None:
    result = written(tmp_path, Tiny(precision=Precision.BF16), backend=Backend.ONNXRUNTIME)
    assert result.models[0].notes == (
        "ONNX Runtime has kernels for bfloat16 on GPUs only. It takes ONNX Runtime 1.24.1 or newer: Triton from 26.02"
        " on.",
    )
    assert [group.kind for group in config(result.path).instance_group] == [1]  # KIND_GPU


def test_bfloat16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    on_cpu = Instances(device=Device.CPU)
    with pytest.raises(UsageError, match=r"computes nothing in bfloat16 on a CPU\. Leave --device cpu out\.") as caught:
        written(tmp_path, Tiny(precision=Precision.BF16, engine="none"), instances=on_cpu)
    assert "--device cpu" in caught.value.message


def test_a_graph_that_no_triton_runs_is_refused_or_forced(tmp_path: Path) -> None:
    padded = Tiny(precision=Precision.BF16, bfloat16=("Pad",), engine="none")
    with pytest.raises(UsageError, match=r"has no kernel for Pad in bfloat16, on no device\. Export it with --fp16"):
        written(tmp_path / "refused", padded)
    forced = written(tmp_path / "forced", padded, force=True)
    assert "has no kernel for Pad in bfloat16" in forced.warnings[0]


def test_the_graph_that_is_served_is_judged_not_the_one_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = Bundle.open(tiny_bundles.write(tmp_path / "padded", PADDED))
    other = Bundle.open(tiny_bundles.write(tmp_path / "other", Tiny(precision=Precision.BF16, engine="none")))
    size = runtime_form.GraphSize(1, 1)
    made = runtime_form.RuntimeGraph(
        other.file(GRAPH), other.manifest, other.manifest.form, is_made=True, before=size, after=size
    )
    monkeypatch.setattr(runtime_form, "graph_for_runtime", lambda bundle, rest=None: made)
    (model,) = resolve_models([BundleArgument(padded.path)], TritonOptions())
    assert not model.warnings
    assert model.versions[0].artifact == made.path
    assert "Triton from 26.02" in model.notes[0]


def test_tensorrt_in_onnxruntime_needs_none_of_its_kernels(tmp_path: Path) -> None:
    padded = tiny_bundles.write(tmp_path / "padded", PADDED)
    (model,) = resolve_models([BundleArgument(padded)], TritonOptions(accelerator=Accelerator.TENSORRT))
    assert not model.warnings
    assert model.needs_gpu


def test_bf16_that_stands_in_no_graph_asks_for_nothing(tmp_path: Path) -> None:
    """`--target cpu` writes an FP32 graph, which OpenVINO computes in bfloat16."""
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none"))
    manifest = read_manifest(bundle)
    manifest["precision"]["asked"] = "bf16"
    write_manifest(bundle, manifest)
    on_cpu = TritonOptions(Backend.ONNXRUNTIME, instances=Instances(device=Device.CPU))
    result = write_repository([BundleArgument(bundle)], tmp_path / "repository", on_cpu)
    assert result.models[0].notes == ()


TRUNCATES = "answers wrongly on a CPU: ONNX Runtime 1.28.0's QuantizeLinear truncates FP16"


def served_int8(tmp_path: Path, device: Device | None, engine: str = "none", **section: str) -> TritonRepository:
    bundle = tiny_bundles.of_int8(tiny_bundles.write(tmp_path / "b", Tiny(engine=engine)), **section)
    return write_repository([BundleArgument(bundle)], tmp_path / "r", TritonOptions(instances=Instances(device=device)))


def test_int8_of_fp16_on_a_cpu_is_a_warning_as_the_images_that_are_known_truncate_it(tmp_path: Path) -> None:
    result = served_int8(tmp_path, Device.CPU)
    (warning,) = result.warnings
    assert TRUNCATES in warning
    assert "Triton 24.08 to 26.08 carry it or an older one" in warning
    assert "Export it again" in warning
    assert serve_command(result) is None


def test_int8_of_fp16_that_may_run_on_a_cpu_is_a_note(tmp_path: Path) -> None:
    result = served_int8(tmp_path, None)
    assert not result.warnings
    assert TRUNCATES in result.models[0].notes[0]


@pytest.mark.parametrize(
    ("device", "engine", "section"),
    [(Device.GPU, "none", {}), (None, "tensorrt", {}), (Device.CPU, "none", {"quantized_from": "fp32"})],
    ids=["on a GPU", "as a plan", "of FP32"],
)
def test_int8_that_no_cpu_truncates_is_served_without_a_word(
    device: Device | None, engine: str, section: dict[str, str], tmp_path: Path
) -> None:
    result = served_int8(tmp_path, device, engine, **section)
    assert not any(TRUNCATES in text for text in (*result.warnings, *result.models[0].notes))


# Ensembles


def test_an_ensemble_goes_from_a_files_bytes_to_labels(tmp_path: Path) -> None:
    result = written(tmp_path, ensemble=Ensemble(top_k=2))
    assert result.steps == ("tiny_preprocess", "tiny_top_k", "tiny_ensemble")
    ensemble = config(result.path, "tiny_ensemble")
    assert tensors(ensemble.input) == {"image": ("TYPE_STRING", [1])}
    answers = {"labels": ("TYPE_STRING", [2]), "probabilities": ("TYPE_FP32", [2]), "indices": ("TYPE_INT64", [2])}
    assert tensors(ensemble.output) == answers
    steps = [step.model_name for step in ensemble.ensemble_scheduling.step]
    assert steps == ["tiny_preprocess", "tiny", "tiny_top_k"]
    assert tensors(config(result.path, "tiny_preprocess").output) == {"input": ("TYPE_FP32", [3, 8, 8])}
    for step in ("tiny_preprocess", "tiny_top_k"):
        assert "spach_deploy" not in (result.path / step / "1" / "model.py").read_text()
    assert (result.path / "tiny_top_k" / "labels.txt").is_file()


def test_a_model_of_pixels_needs_no_preprocessing_step(tmp_path: Path) -> None:
    pixels = Ensemble(EnsembleInput.PIXELS)
    result = written(tmp_path, Tiny(outputs=OutputSpec(IODtype.UINT8)), ensemble=pixels)
    assert result.steps == ("tiny_top_k", "tiny_ensemble")
    assert tensors(config(result.path, "tiny_ensemble").input) == {"pixels": ("TYPE_UINT8", [8, 8, 3])}


def test_the_step_prepares_any_shape_of_pictures(tmp_path: Path) -> None:
    grey = Preprocessing.for_size((6, 10), *channel_statistics(1), crop=0.9, interpolation="nearest")
    result = written(tmp_path, Tiny(preprocessing=grey), ensemble=Ensemble())
    step = config(result.path, "tiny_preprocess")
    assert tensors(step.output) == {"input": ("TYPE_FP32", [1, 6, 10])}
    settings = json.loads(step.parameters["preprocessing"].string_value)
    assert settings == {
        **{"image_size": [6, 10], "resize_size": [6, 11], "interpolation": "nearest"},
        **{"mean": [0.449], "std": [0.226], "dtype": "float32"},
    }
    assert not check_repository(result.path).findings


def test_fewer_classes_than_five_are_all_answered(tmp_path: Path) -> None:
    result = written(tmp_path, Tiny(classes=3), ensemble=Ensemble())
    assert tensors(config(result.path, "tiny_ensemble").output)["labels"] == ("TYPE_STRING", [3])


@pytest.mark.parametrize(
    ("tiny", "ensemble", "reason"),
    [
        (Tiny(), Ensemble(EnsembleInput.PIXELS), "takes normalized images"),
        (Tiny(preprocessing=FIVE), Ensemble(), "takes images of 5 channels, which no picture file has"),
        (Tiny(), Ensemble(top_k=8), "--top-k 8 of 7 classes"),
        (Tiny(), Ensemble(top_k=0), "--top-k 0 of 7 classes"),
        (Tiny(batch=BatchProfile(2, 2, 4)), Ensemble(), "pictures come singly"),
    ],
)
def test_an_ensemble_that_does_not_fit_is_refused(tmp_path: Path, tiny: Tiny, ensemble: Ensemble, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        written(tmp_path, tiny, ensemble=ensemble)
    assert not (tmp_path / "repository").exists()


# Refusals


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a\nb\n", "has 2 lines; the model has 7 classes"),
        ("a\nb\n\nd\ne\nf\ng\n", "no name in line 3"),
        (b"\xff\xfe", "it is not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, content: str | bytes | None, reason: str) -> None:
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=reason):
        written(tmp_path, labels=file)


def test_a_changed_bundle_is_refused(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle")
    (bundle / PLAN).write_bytes(b"ftrt")
    with pytest.raises(BundleError, match=r"engine\.plan was changed"):
        write_repository([BundleArgument(bundle)], tmp_path / "repository", TritonOptions())


def test_a_version_that_is_not_there_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names version 3; tiny has 1"):
        written(tmp_path, version_policy=VersionPolicy.parse("specific:1,3"))


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    first = tiny_bundles.write(tmp_path / "a")
    arguments = [BundleArgument(first), BundleArgument(first, "tiny_ensemble")]
    with pytest.raises(UsageError, match="Two models would be called tiny_ensemble"):
        write_repository(arguments, tmp_path / "repository", TritonOptions(ensemble=Ensemble()))


@pytest.mark.parametrize("text", ["latest:0", "some", "specific:", "specific:0", "latest:-1", ""])
def test_a_policy_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is none"):
        VersionPolicy.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Instances(0),
        lambda: Instances(1, Device.CPU, (0,)),
        lambda: Instances.parse(["tiny:0"]),
        lambda: Instances.parse([":2"]),
        lambda: Instances.parse(["two"]),
    ],
)
def test_instances_that_cannot_be_are_refused(make: Any) -> None:
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize(
    ("resources", "priorities", "reason"),
    [
        (["gpu"], [], "--rate-limit-resource 'gpu' is no resource"),
        (["gpu=0"], [], "'gpu=0' is no resource"),
        (["gpu=1:local"], [], "'gpu=1:local' is no resource"),
        (["a b=1"], [], "'a b=1' is no resource"),
        (["gpu=1", "gpu=2"], [], "gpu is given twice for a model"),
        (["gpu=1", "other:gpu=1:global"], [], "gpu is global for one model and not for another"),
        ([], ["0"], "--rate-limit-priority 0 is no priority"),
        ([], ["tiny=2"], "--rate-limit-priority tiny=2 is no priority"),
    ],
)
def test_a_rate_limiter_that_cannot_be_is_refused(resources: list[str], priorities: list[str], reason: str) -> None:
    with pytest.raises(UsageError) as refused:
        RateLimiter.parse(resources, priorities)
    assert reason in refused.value.message


@pytest.mark.parametrize("option", ["instances", "rate_limiter"])
@pytest.mark.parametrize("name", ["other", "tiny_ensemble"])
def test_an_option_of_a_model_that_does_not_run_here_is_refused(tmp_path: Path, option: str, name: str) -> None:
    number = f"{name}:2"
    given: dict[str, Any] = {
        "instances": Instances.parse([number]),
        "rate_limiter": RateLimiter.parse([], [number]),
    }
    with pytest.raises(UsageError, match=f"names {name}.* Name tiny, tiny_preprocess, tiny_top_k") as refused:
        written(tmp_path, ensemble=Ensemble(), **{option: given[option]})
    assert not (tmp_path / "repository").exists()
    assert refused.value.message.startswith("--")


@pytest.mark.parametrize("name", ["-x", ".x", "a b", ""])
def test_a_name_that_is_no_folder_of_a_url_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no name for a model"):
        BundleArgument.parse(f"{name}=bundle")


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path) -> None:
    assert BundleArgument.parse(str(tmp_path / "a=b")).name is None


# Writing


def test_a_repository_is_replaced_only_when_asked(tmp_path: Path) -> None:
    repository = written(tmp_path).path
    arguments = [BundleArgument(tmp_path / "bundle", "other")]
    with pytest.raises(BundleError, match="holds a model repository already"):
        write_repository(arguments, repository, TritonOptions())
    assert (repository / "tiny").is_dir()
    write_repository(arguments, repository, TritonOptions(), overwrite=True)
    assert sorted(path.name for path in repository.iterdir()) == ["README.md", "manifest.json", "other"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_and_bundles_are_left_alone(tmp_path: Path, overwrite: bool) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.tex").write_text("")
    for target, reason in ((bundle, "something else than a model repository"), (tmp_path / "others", "left alone")):
        with pytest.raises(BundleError, match=reason):
            write_repository([BundleArgument(bundle)], target, TritonOptions(), overwrite=overwrite)
    assert (tmp_path / "others" / "thesis.tex").exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    bundle = tiny_bundles.write(tmp_path / "bundle")
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(SpachError, match="No space left"):
        write_repository([BundleArgument(bundle)], tmp_path / "repository", TritonOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_tiny_graph_computes_what_its_golden_pack_says(tmp_path: Path) -> None:
    """So that tests of servers compare with something true."""
    from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner

    bundle = tiny_bundles.write(tmp_path / "bundle")
    golden = Golden.load(bundle / "golden.npz")
    with OnnxRuntimeRunner(bundle / GRAPH) as runner:
        np.testing.assert_allclose(runner.run({"input": golden.input})["logits"], golden.outputs["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("../../secret", "keeps its weights in ../../secret, which leads outside of its directory"),
        ("gone.data", "keeps its weights in gone.data, which is not beside it. Put gone.data into"),
        ("golden.npz", "keeps its weights in golden.npz, which a copy of it would not find"),
    ],
)
def test_a_graph_without_its_weights_is_no_model(location: str, words: str, tmp_path: Path) -> None:
    bundle = tiny_bundles.with_weights_in(tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none")), location)
    with pytest.raises(UsageError) as refused:
        write_repository([BundleArgument(bundle)], tmp_path / "repository", TritonOptions())
    assert words in str(refused.value)
    with pytest.raises(UsageError) as refused:
        write_folder(bundle, tmp_path / "folder")
    assert words in str(refused.value)
    assert list(tmp_path.iterdir()) == [bundle]


# Form


def small(tmp_path: Path, bundle: Path, **options: Any) -> TritonRepository:
    return write_repository([BundleArgument(bundle, "small")], tmp_path / "repository", TritonOptions(**options))


def test_onnxruntime_gets_a_graph_in_its_own_form_and_one_line_says_so(tmp_path: Path) -> None:
    bundle = small_bundles.for_tensorrt()
    result = small(tmp_path, bundle)
    served = result.path / "small" / "1"
    facts = Manifest.read(served / "bundle.json")
    nodes = len(onnx.load(served / GRAPH).graph.node)
    assert facts.form is Form.CPU
    assert facts.graph.certificate.nodes == nodes
    assert nodes < len(onnx.load(bundle / GRAPH).graph.node)
    assert facts.graph.made is not None
    (note,) = [note for note in result.models[0].notes if "Made anew" in note]
    assert f"in the form for ONNX Runtime: {nodes} nodes" in note
    assert note in repository_text(result)
    assert json.loads(repository_json(result))["models"][0]["forms"] == ["cpu"]
    assert check_repository(result.path).findings == ()


def test_a_made_graph_that_was_changed_afterwards_is_found(tmp_path: Path) -> None:
    result = small(tmp_path, small_bundles.for_tensorrt())
    (result.path / "small" / "1" / GRAPH).write_bytes((small_bundles.for_tensorrt() / GRAPH).read_bytes())
    assert [finding.found for finding in check_repository(result.path).findings] == ["a file with another SHA-256"]


def test_a_graph_for_a_cpu_is_copied(tmp_path: Path) -> None:
    bundle = small_bundles.bundle()
    result = small(tmp_path, bundle)
    assert (result.path / "small" / "1" / GRAPH).read_bytes() == (bundle / GRAPH).read_bytes()
    assert not [note for note in result.models[0].notes if "form" in note]


def test_eight_bits_say_that_a_gpu_has_no_integer_kernels_for_them(tmp_path: Path) -> None:
    bundle = small_quantized.for_tensorrt()
    on_any = small(tmp_path / "any", bundle)
    on_cpu = small(tmp_path / "cpu", bundle, instances=Instances(device=Device.CPU))
    warned = [[note for note in result.models[0].notes if "no integer kernels" in note] for result in (on_any, on_cpu)]
    assert [len(notes) for notes in warned] == [1, 0]
    forms = [Manifest.read(result.path / "small" / "1" / "bundle.json") for result in (on_any, on_cpu)]
    assert [facts.form for facts in forms] == [Form.CPU, Form.CPU_INT8]
    assert [facts.precision.rest for facts in forms] == [Precision.FP16, Precision.FP32]
    for result in (on_any, on_cpu):
        assert check_repository(result.path).findings == ()


# TensorRT as ONNX Runtime's provider


def block(repository: Path, name: str = "tiny") -> dict[str, str]:
    (accelerator,) = config(repository, name).optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    return dict(accelerator.parameters)


def test_the_accelerator_gets_precision_cache_and_the_bundles_profile(tmp_path: Path) -> None:
    tiny = Tiny(batch=BatchProfile(2, 4, 6), precision=Precision.BF16)
    result = written(tmp_path, tiny, accelerator=Accelerator.TENSORRT)
    folder = block(result.path)["trt_engine_cache_path"]
    assert re.fullmatch(r"/tmp/tiny-[0-9a-f]{12}", folder)  # ONNX Runtime makes one folder, not those above it
    assert block(result.path) == {
        "precision_mode": "BF16",
        "trt_engine_cache_enable": "true",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "true",
        "trt_timing_cache_path": folder,
        "trt_profile_min_shapes": "input:1x3x8x8",
        "trt_profile_opt_shapes": "input:4x3x8x8",
        "trt_profile_max_shapes": "input:6x3x8x8",
    }
    model = config(result.path)
    assert (model.backend, [group.kind for group in model.instance_group]) == ("onnxruntime", [1])
    assert check_repository(result.path).findings == ()


def test_the_accelerator_keeps_tensorrts_form(tmp_path: Path) -> None:
    bundle = small_bundles.for_tensorrt()
    result = small(tmp_path, bundle, accelerator=Accelerator.TENSORRT, engine_cache="/engines")
    assert (result.path / "small" / "1" / GRAPH).read_bytes() == (bundle / GRAPH).read_bytes()
    assert re.fullmatch(r"/engines/small-[0-9a-f]{12}", block(result.path, "small")["trt_engine_cache_path"])
    assert block(result.path, "small")["trt_profile_max_shapes"].startswith("input:32x32x32x3")
    assert block(result.path, "small")["precision_mode"] == "FP16"
    assert check_repository(result.path).findings == ()


def test_a_graph_with_other_weights_gets_no_engine_of_the_one_before(tmp_path: Path) -> None:
    """ONNX Runtime names engines by structure, so the folder has to tell weights apart."""
    tiny = [Tiny(precision=Precision.BF16, seed=seed) for seed in (1, 1, 2)]
    found = [
        block(written(tmp_path / str(i), one, accelerator=Accelerator.TENSORRT).path)["trt_engine_cache_path"]
        for i, one in enumerate(tiny)
    ]
    assert found[0] == found[1] != found[2]
    bundles = [tiny_bundles.write(tmp_path / f"v{i}", one) for i, one in enumerate(tiny)]
    with pytest.raises(UsageError, match="versions of tiny would share one folder of engines"):
        resolve_models([BundleArgument(bundle) for bundle in bundles], TritonOptions(accelerator=Accelerator.TENSORRT))


def test_eight_bits_among_half_have_no_precision_mode(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8 with the rest in fp16 has no precision_mode") as caught:
        small(tmp_path, small_quantized.for_tensorrt(), accelerator=Accelerator.TENSORRT)
    assert "--int8 --rest fp32" in caught.value.hint
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": Accelerator.TENSORRT, "backend": Backend.TENSORRT}, "--backend tensorrt serves a plan"),
        ({"accelerator": Accelerator.TENSORRT, "instances": Instances(device=Device.CPU)}, "on GPUs alone"),
        ({"engine_cache": "/engines"}, "--engine-cache needs --accelerator"),
        *(
            ({"accelerator": Accelerator.TENSORRT, "engine_cache": folder}, "is no folder of a server")
            for folder in ("engines", "", "/a:/b", "/a\n")
        ),
    ],
)
def test_options_that_contradict_the_accelerator_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TritonOptions(**options)


def test_a_bundle_of_target_cpu_is_served_on_the_cpu_unless_a_device_is_given(tmp_path: Path) -> None:
    bundle = tiny_bundles.for_cpu(tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none")))
    for device, kind in ((None, 2), (Device.GPU, 1), (Device.AUTO, 0)):
        options = TritonOptions(instances=Instances(device=device))
        result = write_repository([BundleArgument(bundle)], tmp_path / f"repository-{kind}", options)
        assert [group.kind for group in config(result.path).instance_group] == [kind]
        assert ("--gpus all" in (result.path / "README.md").read_text()) is (kind != 2)


def test_bfloat16_of_target_cpu_is_refused_with_what_runs_it(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none", precision=Precision.BF16))
    write_repository([BundleArgument(bundle)], tmp_path / "on-gpu", TritonOptions())
    with pytest.raises(UsageError, match=r"in bfloat16 on a CPU\. Export it for ONNX Runtime, .* in OpenVINO with"):
        write_repository([BundleArgument(tiny_bundles.for_cpu(bundle))], tmp_path / "on-cpu", TritonOptions())


@pytest.mark.parametrize(("device", "is_said"), [(None, True), (Device.AUTO, True), (Device.GPU, False)])
def test_int8_for_vnni_says_so(device: Device | None, is_said: bool, tmp_path: Path) -> None:
    options = TritonOptions(instances=Instances(device=device))
    result = write_repository([BundleArgument(tiny_bundles.for_vnni(tmp_path / "b"))], tmp_path / "r", options)
    assert (VNNI_ONLY in result.models[0].notes) is is_said
    assert (VNNI_ONLY in (result.path / "README.md").read_text()) is is_said
