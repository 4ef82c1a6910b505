"""What an evaluation refuses: each error names the field or file, its value and a remedy."""

import numpy as np
import pytest

from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from tests.support.image_files import write_folder, write_npz
from tests.support.small_evaluation import config_of

REFUSED_BEFORE_TRAINING = {
    "reference": {"reference": "npz:/nowhere/x.npz"},
    "images": {"images": "folder:/nowhere"},
    "seeds": {"seeds": "0-2"},
    "seeds in training": {"seeds_in_training": "5"},
}


@pytest.mark.parametrize("case", REFUSED_BEFORE_TRAINING)
def test_evaluation_is_refused_before_training(source, tmp_path, case):
    with pytest.raises(InputError, match="nowhere|seeds"):
        run(
            config_of(source, **REFUSED_BEFORE_TRAINING[case]).to_config_dict(),
            str(tmp_path),
            mode="all",
        )
    assert not list(tmp_path.glob("stage*"))


REFUSED = {
    "own size without a reference": (
        {"features": "inception", "images": "samples, stage1@native"},
        r"native_reference='' cannot be used.*'npz:PATH' for 'stage1@native' in images",
    ),
    "own size for a classifier": (
        {"native_reference": "training"},
        r"native_reference='training'.*images of the final size",
    ),
    "unknown reference of own size": (
        {"features": "inception", "native_reference": "x"},
        r"native_reference='x'.*'held_out'",
    ),
    "own size of the last stage": (
        {"features": "inception", "images": "stage2@native"},
        r"images='stage2@native'.*'stage1@nati",
    ),
    "nothing held out for it": (
        {"features": "inception", "held_out": 0, "native_reference": "held_out"},
        r"data.held_out=0 cannot",
    ),
    "no features": (
        {"features": "none"},
        r"features='none' with --mode=evaluate .*Use 'inception', 'efficientnet' or 'classifier'",
    ),
    "unknown features": ({"features": "dino"}, r"features='dino'"),
    "unknown set": ({"images": "samples, stage2"}, r"images='samples, stage2'.*'stage1'"),
    "unknown reference": ({"reference": "folder"}, r"reference='folder'"),
    "nothing held out": ({"held_out": 0, "images": "held_out"}, r"data.held_out=0"),
    "all held out": ({"held_out": 60}, r"data.held_out=60 leaves none of 60"),
    "too few images": ({"images": "npz:{tmp}/few.npz"}, r"few.npz has 3 images\. Use 4 or more\."),
    "no weights": (
        {"features": "inception", "weights": "/nowhere/x.pth"},
        r"no /nowhere/x.pth.*\. Download .*curl",
    ),
    "no classifier": (
        {"weights": "/nowhere/x"},
        r"weights='/nowhere/x' is not a file\. Use a classifier",
    ),
    "npz that is not there": (
        {"images": "npz:/nowhere/x.npz"},
        r"/nowhere/x.npz cannot be used \(No such file",
    ),
    "npz of another size": (
        {"images": "npz:{tmp}/large.npz"},
        r"large.npz has images of shape \(20, 9, 8, 3\), uint8\. Use uint8 of shape \('n', 8, 8, 3\)",
    ),
    "grey npz": (
        {"images": "npz:{tmp}/grey.npz"},
        r"grey.npz has images of shape \(20, 8, 8, 1\), uint8\. Use",
    ),
    "npz of other numbers": (
        {"images": "npz:{tmp}/float.npz"},
        r"float.npz has images of shape .*float32\. Use",
    ),
    "npz without images": (
        {"images": "npz:{tmp}/other.npz"},
        r"other.npz has no images, only stuff\. Use a file with an array arr_0",
    ),
    "npz with objects": (
        {"images": "npz:{tmp}/objects.npz"},
        r"objects.npz cannot be used .*never loaded",
    ),
    "folder of another size": (
        {"images": "folder:{tmp}/large"},
        r"'00.png' of folder:.*/large is 9 x 9 \(height x width\)\. Use images of 8 x 8, as config.stages",
    ),
    "grey folder": (
        {"images": "folder:{tmp}/grey"},
        r"the images of folder:.*grey are grey\. Use colour images",
    ),
    "one name for two": ({"name": "samples"}, r"evaluation.name='samples'"),
    "a name of the run's": ({"name": "report"}, r"evaluation.name='report'"),
    "a bucket to measure": (
        {"images": "samples, npz:gs://b/x.npz"},
        r"evaluation.images='gs://b/x.npz' is a URL",
    ),
    "a bucket to compare with": (
        {"reference": "npz:s3://b/x.npz"},
        r"evaluation.reference='s3://b/x.npz' is a URL",
    ),
    "weights in a bucket": ({"weights": "gs://b/x"}, r"evaluation.weights='gs://b/x' is a URL"),
    "no JSON list": ({"images": '["samples'}, r"evaluation.images=.* is not a JSON list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_evaluation_is_refused(source, workdir, tmp_path, case):
    values, pattern = REFUSED[case]
    write_npz(tmp_path / "few.npz", count=3)
    write_npz(tmp_path / "large.npz", shape=(9, 8, 3))
    write_npz(tmp_path / "grey.npz", shape=(8, 8, 1))
    write_npz(tmp_path / "float.npz", dtype=np.float32)
    write_npz(tmp_path / "other.npz", name="stuff")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], object))
    write_folder(tmp_path / "large", size=9)
    write_folder(tmp_path / "grey", mode="L")
    values = {
        k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in values.items()
    }
    config = config_of(
        source,
        **{"images": "samples", "reference": "training", "name": case.replace(" ", "_")} | values,
    )
    with pytest.raises(InputError, match=pattern) as caught:
        run(config.to_config_dict(), str(workdir), mode="evaluate")
    assert "\n" not in str(caught.value)


def test_classifier_needs_classes(tmp_path, workdir):
    write_folder(tmp_path / "plain")
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="features='classifier' needs classes"):
        run(
            config_of(tmp_path / "plain", held_out=5).to_config_dict(),
            str(workdir),
            mode="evaluate",
        )
