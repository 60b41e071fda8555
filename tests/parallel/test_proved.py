"""The page of layouts says what the tests prove, no more and no less."""

from itertools import zip_longest
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.parallel import proved, test_compile, test_layouts, test_zero
from tests.parallel.parity import told

CASES = [(case, "fp64") for case in [*test_layouts.CASES, *test_layouts.MORE_CASES, *test_compile.CASES]]
CASES += [(case, "fp32") for case in [*test_layouts.SINGLE, *test_zero.CASES, *test_zero.MORE_CASES]]
PROOFS = [
    proved.Proof(**told(case), precision=precision, loss=0.0, grad_norm=0.0) for case, precision in CASES
]


def test_the_page_has_the_cases_of_the_tests() -> None:
    on_page = [row[:-2] for row in proved.rows_of(proved.PAGE.read_text())]
    expected = [row[:-2] for row in proved.rows(PROOFS)]
    for row, wanted in zip_longest(on_page, expected):
        if row != wanted:
            layout, precision, *_ = wanted or row
            pytest.fail(
                f"docs/layouts.md hasn't what is tried of {layout} in {precision}: run `make prove-layouts`",
                pytrace=False,
            )


REPORT = """<testsuites><testsuite><properties><property name="machine" value="3 cores"/></properties>
<testcase classname="tests.test_a" name="one" time="1.5"><properties>
<property name="layout" value="tp=2"/><property name="settings" value="micro_batch_size=4 cpu_offload=true"/>
<property name="model" value="moe"/><property name="precision" value="fp64"/>
<property name="loss" value="2e-15"/><property name="grad_norm" value="3e-13"/></properties></testcase>
<testcase classname="tests.test_a" name="two" time="2"><properties>
<property name="layout" value="tp=2"/><property name="settings" value="micro_batch_size=2"/>
<property name="model" value=""/><property name="precision" value="fp64"/>
<property name="loss" value="1e-15"/><property name="grad_norm" value="4e-13"/></properties>OUTCOME</testcase>
</testsuite></testsuites>"""


def test_a_report_becomes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, report = tmp_path / "layouts.md", tmp_path / "report.xml"
    monkeypatch.setattr(proved, "PAGE", page)
    page.write_text(f"before\n{proved.BEGIN}old\n{proved.END}\nafter\n")
    report.write_text(REPORT.replace("OUTCOME", ""))
    for _ in range(2):
        proved.main([str(report)])
        assert page.read_text() == (
            f"before\n{proved.BEGIN}"
            "| layout | precision | with | model | cases | loss | gradient norm |\n"
            "| --- | --- | --- | --- | --- | --- | --- |\n"
            "| `tp=2` | fp64 | cpu_offload true; micro_batch_size 2, 4 | moe | 2 | 2e-15 | 4e-13 |\n\n"
            f"2 cases: `test_a.py` 4 s, on 3 cores.\n{proved.END}\nafter\n"
        )


@pytest.mark.parametrize("outcome", ["failure", "error", "skipped"])
def test_a_case_that_did_not_pass_is_no_proof(outcome: str) -> None:
    with pytest.raises(proved.Unproved, match="two did not pass"):
        proved.read(ElementTree.fromstring(REPORT.replace("OUTCOME", f"<{outcome}/>")))
