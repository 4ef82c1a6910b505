"""The page of evaluations."""

import pytest

from rdm_jax.config import Published
from rdm_jax.evaluation.report import write_report
from rdm_jax.runtime.errors import InputError
from tests.support.evaluations import write_evaluation
from tests.support.pictures import shows_a_curve


def test_page_of_a_workdir(tmp_path):
    published = Published("guided", fid=1.87, precision=0.81)
    write_evaluation(
        tmp_path / "evaluation",
        "stage1",
        "samples",
        published=published,
        fid=2.5,
        sfid=4.25,
        precision=0.75,
    )
    for images in (100, 200):
        write_evaluation(
            tmp_path / f"stage1/evaluations/{images:010d}",
            "stage1",
            fid=1000.0 / images,
            precision=0.5,
        )
    write_report(tmp_path, [])
    page = (tmp_path / "report/report.md").read_text()
    assert "| samples | 50,000 | 2.50 | 4.25 | 0.750     |" in page and "a note of samples" in page
    rows = [line.replace(" ", "") for line in page.splitlines()]
    assert (
        "|paper(guided)|1.87|0.810|" in rows
        and "|thisproject,samples,50,000images|2.50|0.750|" in rows
    )
    for picture in ("1-stage1.png", "1-samples.png", "curves.png"):
        assert f"({picture})" in page and (tmp_path / "report" / picture).is_file()
    assert shows_a_curve(tmp_path / "report/curves.png")


def test_page_of_several_runs(tmp_path):
    paths = [
        write_evaluation(tmp_path / name / "evaluation", "samples", fid=fid)
        for name, fid in (("one", 3.0), ("two", 4.0))
    ]
    write_report(tmp_path / "here", paths)
    page = (tmp_path / "here/report/report.md").read_text()
    assert (
        "## one/evaluation" in page
        and "## two/evaluation" in page
        and "4.00" in page
        and "paper" not in page
    )
    assert (tmp_path / "here/report/2-samples.png").is_file()


def test_titles_of_runs_with_one_name_differ(tmp_path):
    paths = [
        write_evaluation(tmp_path / side / "run/evaluation", "samples", fid=3.0) for side in "ab"
    ]
    write_report(tmp_path / "here", [*paths, paths[0]])
    page = (tmp_path / "here/report/report.md").read_text()
    assert page.count("## a/run/evaluation") == 2 and page.count("## b/run/evaluation") == 1


def test_published_metrics_need_inception(tmp_path):
    path = write_evaluation(
        tmp_path / "evaluation",
        "samples",
        published=Published("guided", precision=0.81),
        precision=0.9,
    )
    path.write_text(path.read_text().replace('"inception"', '"classifier"'))
    write_report(tmp_path, [])
    assert "guided" not in (tmp_path / "report/report.md").read_text()


DAMAGED = [
    "[]",
    "[" * 5000,
    '{"results": [], "made_with": {}}',
    '{"results": {"a": {}}}',
    '{"results": {"a": {"images": 1, "metrics": {"fid": "x"}}}}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_report_refuses_damaged_evaluations(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(
        InputError, match=r"is not an evaluation, or damaged\. Use an evaluation.json"
    ):
        write_report(tmp_path, [tmp_path / "evaluation.json"])


def test_report_refuses_incomplete_evaluations(tmp_path):
    path = write_evaluation(tmp_path / "evaluation", "samples", fid=3.0)
    path.write_text(path.read_text().replace('"devices"', '"others"'))
    with pytest.raises(
        InputError, match=r"is not an evaluation, or damaged\. Use an evaluation.json"
    ):
        write_report(tmp_path, [path])


def test_report_refuses_other_files(tmp_path):
    with pytest.raises(
        InputError, match=r"no evaluation.json in .*\. Evaluate first \(--mode=evaluate\)"
    ):
        write_report(tmp_path, [])
    (tmp_path / "evaluation.json").write_text('{"results": 1')
    with pytest.raises(
        InputError, match=r"is not an evaluation, or damaged\. Use an evaluation.json"
    ):
        write_report(tmp_path, [tmp_path / "evaluation.json"])
