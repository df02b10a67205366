"""Our translation and Istio's control plane mean the same for every case of the table."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.differential.compare import accepted
from tests.differential.page import PAGE, with_list
from tests.differential.suite import RESULT, Outcome, run, write
from tests.differential.table import FOLDER, Case, cases
from tests.support import tools
from tools import istio_fields

TABLE = list(cases())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every case, run in bulk by one control plane."""
    program = tools.require("pilot-discovery")
    found = asyncio.run(run(program, tmp_path_factory.mktemp("istiod"), TABLE))
    write(found, accepted())
    return {outcome.case.id: outcome for outcome in found}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in TABLE])
def test_means_the_same(outcomes: dict[str, Outcome], case: Case) -> None:
    outcome = outcomes[case.id]
    assert not outcome.error
    if case.refused:
        assert outcome.refusal, "is taken now: take it out of differences.yaml"
        return
    assert not outcome.refusal
    assert not outcome.left, "\n".join(str(mismatch) for mismatch in outcome.left[:20])


def test_names_are_unique() -> None:
    names = [case.id for case in TABLE]
    assert len(names) == len(set(names))
    assert len(names) >= 150


def test_every_accepted_difference_is_needed(outcomes: dict[str, Outcome]) -> None:
    """The list stays short: an entry that no case meets is taken out."""
    met = {key for outcome in outcomes.values() for key in outcome.used}
    met |= {outcome.case.refused for outcome in outcomes.values() if outcome.refusal}
    assert not {item.id for item in accepted() if item.compared} - met


def test_the_page_lists_the_differences() -> None:
    text = PAGE.read_text()
    assert text == with_list(text), "run python -m tests.differential.page"


@pytest.mark.usefixtures("outcomes")
def test_the_page_of_fields_is_what_was_found() -> None:
    if not all(folder.is_dir() for folder in istio_fields.SCHEMAS):
        pytest.skip("the schemas of Istio's API are not here: `make tools` gets them")
    results = json.loads(RESULT.read_text())["fields"]
    found = istio_fields.page(istio_fields.all_kinds(), results)
    assert istio_fields.PAGE.read_text() == found, "run python tools/istio_fields.py after the differential suite"


def test_istio_takes_every_document() -> None:
    """A case that Istio's own validation refuses would compare what nobody can apply."""
    # Of ports whose names say no protocol it complains, too; that they are taken is what those cases are about.
    files = [path for path in sorted((FOLDER / "cases").glob("*.yaml")) if path.stem != "service"]
    result = tools.run("istioctl", "validate", *(word for path in files for word in ("-f", path)))
    assert result.returncode == 0, result.stdout + result.stderr
