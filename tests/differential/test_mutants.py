"""Some hundred valid documents, each changed by chance: both sides refuse the same, and warn of the same.

`python -m tests.differential.mutants --count 20000 --seed 1` does it for more.
"""

from __future__ import annotations

import pytest

from tests.differential.mutants import SCHEMAS, accepted, mismatch, mutants, ours, verdicts

COUNT = 300
SEED = 21


def test_changed_documents_are_refused_by_both_or_by_neither() -> None:
    if not all(folder.is_dir() for folder in SCHEMAS):
        pytest.skip("the schemas are not here: `make tools` gets them")
    made, known = mutants(SEED, COUNT)
    told = verdicts([document for document, _ in made], known)
    found = [mismatch(document, how, theirs) for (document, how), theirs in zip(made, told, strict=True)]
    lines = [
        f"{one.what}: {one.changed}\n{one.document}\nus: {one.ours}\na cluster: {one.theirs}" for one in found if one
    ]
    assert not lines, "\n".join(lines)
    assert COUNT * 0.2 < sum(bool(verdict.refused) for verdict in told) < COUNT * 0.9


def test_what_is_refused_by_name_is_no_mismatch() -> None:
    document = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "Sidecar",
        "metadata": {"name": "m-000000", "namespace": "shop"},
        "spec": {"egress": [{"bind": "unix:///x", "port": {"protocol": "TCP"}, "hosts": ["*/*"]}]},
    }
    assert accepted(ours(document).refused)
    assert not accepted("spec.hosts: must be a list, not a string")
